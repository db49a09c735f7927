"""Draws where the time of a run went: each of its starts, from the first submission on."""

import time
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_hybrid.errors import UserError
from megatron_hybrid.human import human_duration
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png
from megatron_hybrid.training.run_time import CAUSES, RunTime, Span, run_time

_COLOR_OF = {
    "training": COLORS[2], "checkpoint": COLORS[0], "rewound": COLORS[6],
    "start-up": COLORS[3], "down": INK, "queue": "#d1d5db",
}  # fmt: skip
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_run_time(run_dir: Path, output: Path) -> None:
    """Draw `run_dir/attempts.jsonl` into the PNG `output`: a row for each start.

    Raises:
        UserError: the folder holds no run that was started.
    """
    found = run_time(run_dir, time.time())
    if not found.attempts:
        raise UserError(f"{run_dir} has no attempts.jsonl: is it the folder of a training run?")
    rows = _rows(found)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        height = 1.9 + 0.34 * len(rows)  # inches
        figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.06, right=0.97, top=1 - 1.15 / height, bottom=0.55 / height)
        begin = found.spans[0].start
        scale, unit = next((pair for pair in _UNITS if found.total >= 2 * pair[0]), _UNITS[-1])
        for row, spans in enumerate(rows):
            for cause, color in _COLOR_OF.items():
                bars = [
                    ((s.start - begin) / scale, (s.end - s.start) / scale)
                    for s in spans if s.cause == cause
                ]  # fmt: skip
                axes.broken_barh(bars, (row + 0.15, 0.7), facecolors=color)
        axes.set_ylim(len(rows), 0)
        axes.set_xlim(0, found.total / scale)
        axes.set_yticks(
            [row + 0.5 for row in range(len(rows))], [str(row + 1) for row in range(len(rows))]
        )
        axes.set_ylabel("start")
        axes.set_xlabel(f"{unit} since the first {'submission' if _queued(found) else 'start'}")
        axes.tick_params(length=3)
        _write_heading(figure, run_dir.resolve().name, found)
        save_png(figure, output)


def _queued(found: RunTime) -> bool:
    return found.spans[0].cause == "queue"


def _rows(found: RunTime) -> list[list[Span]]:
    """Spans by start; what is waited before a start belongs to its row."""
    rows: list[list[Span]] = [[]]
    for span in found.spans:
        worked = any(before.cause != "queue" for before in rows[-1])
        if worked and span.cause in ("queue", "start-up") and rows[-1][-1].cause != "queue":
            rows.append([])
        rows[-1].append(span)
    return rows


def _write_heading(figure: Figure, name: str, found: RunTime) -> None:
    height = figure.get_figheight()
    figure.text(
        0.06, 1 - 0.38 / height, name, fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    ended = f"ended: {found.ended}" if found.ended else "not ended"
    note = (
        f"{found.goodput:.1%} of {human_duration(found.total)} in steps that count; "
        f"{found.attempts} starts, {found.failures} failures; {ended}"
    )
    figure.text(0.97, 1 - 0.36 / height, note, ha="right", color=PALE_INK)
    entries = [
        Patch(color=_COLOR_OF[cause], label=f"{cause} {human_duration(seconds)}")
        for cause in CAUSES
        if (seconds := found.seconds(cause)) > 0
    ]
    figure.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(0.053, 1 - 0.5 / height),
        ncols=len(entries), frameon=False, handlelength=1, columnspacing=1.4,
    )  # fmt: skip
