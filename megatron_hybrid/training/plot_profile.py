"""Draws where a step's time goes, by layer kind and pass."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png

_PASSES = {"forward": COLORS[0], "backward": COLORS[4], "recomputed": COLORS[3]}


def draw_profile(table: dict[str, Any], output: Path, name: str) -> None:
    """Draw `profile.summary`'s table into the PNG `output`."""
    rows = [row for row in table["rows"] if row["total_ms"] >= 1e-3 * table["step_ms"]]
    with mpl.rc_context(STYLE):
        height = 1.7 + 0.42 * len(rows)
        figure = Figure(figsize=(9.5, height), dpi=160, facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.23, right=0.9, top=1 - 1.0 / height, bottom=0.5 / height)
        places, left = np.arange(len(rows)), np.zeros(len(rows))
        for phase, color in _PASSES.items():
            values = np.array([row[f"{phase}_ms"] for row in rows])
            if values.any():
                axes.barh(places, values, 0.66, left, color=color, label=phase)
            left += values
        rest = np.array([row["total_ms"] for row in rows]) - left
        axes.barh(places, rest, 0.66, left, color="#9ca3af")
        for place, row in zip(places, rows, strict=True):
            axes.annotate(
                f"{row['total_ms']:.1f} ms  {row['total_ms'] / table['step_ms']:.0%}",
                (row["total_ms"], place), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
        labels = [f"{row['what']} x {row['layers']}" if row["layers"] else row["what"]
                  for row in rows]  # fmt: skip
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(row["total_ms"] for row in rows))  # room for the labels
        axes.grid(False, axis="y")
        axes.set_xlabel("milliseconds a step")
        axes.legend(loc="lower right", frameon=False, ncols=3, bbox_to_anchor=(1.08, 1.0))
        figure.text(0.02, 1 - 0.34 / height, name, fontsize=15, fontweight="bold", va="center")
        figure.text(
            0.02, 1 - 0.66 / height,
            f"{table['step_ms']:.1f} ms a step, rank {table['rank']} of {table['world_size']}, "
            f"mean of {table['steps']} steps",
            color=PALE_INK, va="center",
        )  # fmt: skip
        save_png(figure, output)
