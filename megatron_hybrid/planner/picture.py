"""Draws the memory of each pipeline stage, beside what a GPU has."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from megatron_hybrid.planner.hardware import RESERVE_GIB, Gpu
from megatron_hybrid.planner.memory import PARTS, StageMemory
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png

GIB = 2**30
_COLORS = dict(
    zip(
        PARTS,
        (COLORS[0], "#93c5fd", COLORS[4], COLORS[3], COLORS[1], "#9ca3af", "#d4d4d8"),
        strict=True,
    )
)


def draw_memory(
    memory: Sequence[StageMemory], gpu: Gpu, name: str, note: str, output: Path
) -> None:
    """Draw into the PNG `output`.

    Args:
        name, note: the heading, and what is said below it.
    """
    with mpl.rc_context(STYLE):
        width = max(6.5, 2.2 + 0.62 * len(memory))
        figure = Figure(figsize=(width, 5.2), dpi=160, facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.75 / width, right=1 - 2.0 / width, top=0.82, bottom=0.13)
        places = np.arange(len(memory))
        below = np.zeros(len(memory))
        for part in PARTS:
            sizes = np.array([getattr(stage, part) / GIB for stage in memory])
            if sizes.any():
                axes.bar(
                    places, sizes, 0.72, below, color=_COLORS[part], edgecolor="white",
                    label=part.replace("_", " "), linewidth=0.6,
                )  # fmt: skip
            below += sizes
        for place, total in zip(places, below, strict=True):
            axes.annotate(
                f"{total:.1f}", (place, total), xytext=(0, 3), textcoords="offset points",
                ha="center", fontsize=8.5, fontweight="bold", color=INK,
            )  # fmt: skip
        usable = gpu.memory_gib - RESERVE_GIB
        axes.axhline(gpu.memory_gib, color=INK, linewidth=1.2)
        axes.axhline(usable, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        for height, text in ((gpu.memory_gib, gpu.name), (usable, "usable")):
            axes.annotate(
                f"{text} {height:.1f}", (1, height), xycoords=("axes fraction", "data"),
                xytext=(6, 0), textcoords="offset points", va="center", color=PALE_INK,
            )  # fmt: skip
        axes.set_ylim(0, max(gpu.memory_gib, below.max()) * 1.08)
        axes.set_xticks(places, [str(stage.stage) for stage in memory])
        axes.set_xlabel("pipeline stage")
        axes.set_ylabel("GiB on its fullest GPU")
        axes.grid(False, axis="x")
        axes.legend(
            loc="upper left", bbox_to_anchor=(1.02, 0.78), frameon=False, fontsize=9,
            reverse=True,
        )  # fmt: skip
        left = 0.75 / width
        figure.text(left, 0.93, name, fontsize=15, fontweight="bold", va="center", color=INK)
        figure.text(left, 0.872, note, color=PALE_INK, va="center", fontsize=9.5)
        save_png(figure, output)
