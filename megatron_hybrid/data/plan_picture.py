"""Draws a plan: the share of every source over the run, and how often each is read by then."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from megatron_hybrid.data.plan import PhaseUse, Plan
from megatron_hybrid.human import human_count
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, title, token_axis

_MOST_SOURCES = 24  # with a colour and a line of their own
_OTHERS_COLOR = "#d1d5db"
_TINTS = (0.0, 0.45, 0.7)  # how far from the full colour to white
_LINE_INCHES = 0.235
_NAME_WIDTH, _NOTE_WIDTH = 0.0125, 0.0092  # of a letter, about, as a share of the axis


@dataclass(frozen=True)
class _Band:
    """A source, or all small ones together, over the phases.

    Attributes:
        shares: of each phase's samples.
        epochs: passes over it by the end of each phase; of several, over the one read most often.
        tokens: read in the whole run.
        several: whether these are the small ones.
    """

    name: str
    color: str
    shares: tuple[float, ...]
    epochs: tuple[float, ...]
    tokens: int
    several: bool = False


def draw_plan(plan: Plan, path: Path, name: str = "data plan", consumed_samples: int = 0) -> None:
    """Draw a plan into the PNG `path`.

    Args:
        plan: of the whole run.
        path: of the picture, which is written whole; its folder is made.
        name: of the run, the heading.
        consumed_samples: where the run goes on; a line marks it where it is above 0.
    """
    table = plan.table()
    bands = _bands(plan, table)
    with mpl.rc_context(STYLE):
        height = max(7.6, 2.9 + _LINE_INCHES * len(bands))  # inches
        figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, 1, height_ratios=(2.2, 1), left=0.058, right=0.72, top=1 - 1.62 / height,
            bottom=0.55 / height, hspace=0.36,
        )  # fmt: skip
        shares, epochs = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
        _draw_shares(shares, table, bands, height)
        _draw_epochs(epochs, table, bands)
        token_axis((shares, epochs), plan.tokens)
        if consumed_samples:
            _mark(shares, sum(use.tokens for use in plan.consumed(consumed_samples)))
        _write_legend(figure, bands)
        _write_heading(figure, plan, table, name)
        save_png(figure, path)


def _bands(plan: Plan, table: Sequence[PhaseUse]) -> list[_Band]:
    """The sources that are read, the largest at the bottom; the small ones of many as one."""
    read = plan.consumed(plan.samples)
    order = sorted((n for n, use in enumerate(read) if use.tokens), key=lambda n: -read[n].tokens)
    own = order if len(order) <= _MOST_SOURCES else order[: _MOST_SOURCES - 1]
    samples = [phase.end_sample - phase.first_sample for phase in table]

    def shares(numbers: Sequence[int]) -> tuple[float, ...]:
        taken = [sum(phase.sources[n].samples for n in numbers) for phase in table]
        return tuple(part / whole for part, whole in zip(taken, samples, strict=True))

    bands = [
        _Band(
            read[n].name,
            _color(place),
            shares([n]),
            tuple(phase.sources[n].epochs for phase in table),
            read[n].tokens,
        )
        for place, n in enumerate(own)
    ]
    if rest := order[len(own) :]:
        tokens = sum(read[n].tokens for n in rest)
        most = tuple(max(phase.sources[n].epochs for n in rest) for phase in table)
        name = f"{len(rest)} others"
        bands.append(_Band(name, _OTHERS_COLOR, shares(rest), most, tokens, several=True))
    return bands


def _color(number: int) -> str:
    """The colours of the house, then paler ones."""
    turn, place = divmod(number, len(COLORS))
    base = np.array(to_rgb(COLORS[place]))
    red, green, blue = base + (1 - base) * _TINTS[turn % len(_TINTS)]
    return to_hex((red, green, blue))


def _draw_shares(
    axes: Axes, table: Sequence[PhaseUse], bands: Sequence[_Band], figure_height: float
) -> None:
    starts = [phase.start_tokens for phase in table]
    widths = [phase.end_tokens - phase.start_tokens for phase in table]
    bottom = np.zeros(len(table))
    for band in bands:
        axes.bar(
            starts, band.shares, widths, bottom, align="edge", color=band.color,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        bottom += band.shares
    for start in starts[1:]:
        axes.axvline(start, color="white", linewidth=2.4)
        axes.axvline(start, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(False)
    title(axes, "Blend", "share of each source in the samples of a phase", pad=40)
    _name_phases(axes, table, figure_height)


def _name_phases(axes: Axes, table: Sequence[PhaseUse], figure_height: float) -> None:
    """Each phase's name above its start, moved aside where its neighbours need the room."""
    end = table[-1].end_tokens
    several = len({phase.phase.seq_length for phase in table}) > 1
    longest = max(4, int(1.04 / _NAME_WIDTH / len(table)) - 1)  # letters, where there are many
    names = [_cut(phase.phase.name, longest) for phase in table]
    notes = [
        f"{(phase.end_tokens - phase.start_tokens) / end:.1%}"
        + (f" · seq {phase.phase.seq_length:,}" if several and longest > 16 else "")
        for phase in table
    ]
    widths = [
        max(_NAME_WIDTH * len(name), _NOTE_WIDTH * len(note)) + _NAME_WIDTH
        for name, note in zip(names, notes, strict=True)
    ]
    starts = [phase.start_tokens / end for phase in table]
    point = 1 / (72 * axes.get_position().height * figure_height)  # as a share of the axis
    for start, place, name, note in zip(starts, _spread(starts, widths), names, notes, strict=True):
        style: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        axes.text(place, 1 + 24 * point, name, fontweight="bold", **style)
        axes.text(place, 1 + 13 * point, note, color=PALE_INK, fontsize=8.5, **style)
        corner = 1 + 8 * point
        axes.plot(
            (place, place, start), (corner + 3 * point, corner, 1), color=PALE_INK, linewidth=0.8,
            **style,
        )  # fmt: skip


def _spread(starts: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Places at or near `starts` for labels of these widths, so that none covers the next one."""
    places: list[float] = []
    for start, _ in zip(starts, widths, strict=True):
        free = places[-1] + widths[len(places) - 1] if places else 0.0
        places.append(max(start, free))
    limit = 1.04  # a little beyond the axis there is nothing
    for number in reversed(range(len(places))):
        places[number] = max(0.0, min(places[number], limit - widths[number]))
        limit = places[number]
    return places


def _cut(name: str, letters: int) -> str:
    """The name, or its end where it is too long: prefixes differ there."""
    return name if len(name) <= letters else "…" + name[1 - letters :]


def _draw_epochs(axes: Axes, table: Sequence[PhaseUse], bands: Sequence[_Band]) -> None:
    tokens = [0, *(phase.end_tokens for phase in table)]
    for band in reversed(bands):
        axes.plot(tokens, [0.0, *band.epochs], color=band.color, linewidth=2, clip_on=False)
    for phase in table[1:]:
        axes.axvline(phase.start_tokens, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    title(axes, "Epochs", "passes over each source so far")


def _mark(axes: Axes, tokens: int) -> None:
    axes.axvline(tokens, color=INK, linewidth=2)
    axes.annotate(
        "read until here", (tokens, 0.5), xytext=(5, 0), textcoords="offset points",
        color="white", fontweight="bold", rotation=90, va="center",
    )  # fmt: skip


def _write_legend(figure: Figure, bands: Sequence[_Band]) -> None:
    """A line a source in the order of the picture, the top one first: name, tokens, epochs."""
    height = figure.get_figheight()
    top = height - 1.42
    columns = {"tokens": 0.925, "epochs": 0.985}
    for text, x in columns.items():
        figure.text(x, top / height, text, color=PALE_INK, ha="right", va="center", fontsize=9)
    for number, band in enumerate(reversed(bands), start=1):
        y = (top - _LINE_INCHES * number) / height
        swatch = Rectangle(
            (0.745, y - 0.055 / height), 0.13 / 11, 0.13 / height, color=band.color,
            transform=figure.transFigure,
        )  # fmt: skip
        figure.add_artist(swatch)
        figure.text(0.763, y, _cut(band.name, 16), va="center", fontsize=9.5)
        figure.text(columns["tokens"], y, human_count(band.tokens), ha="right", va="center")
        epochs = f"{'≤ ' if band.several else ''}{band.epochs[-1]:.2f}"
        figure.text(
            columns["epochs"], y, epochs, ha="right", va="center", fontweight="bold",
        )  # fmt: skip


def _write_heading(figure: Figure, plan: Plan, table: Sequence[PhaseUse], name: str) -> None:
    height = figure.get_figheight()
    figure.text(0.058, 1 - 0.35 / height, name, fontsize=17, fontweight="bold", va="center")
    read = [use for use in plan.consumed(plan.samples) if use.tokens]
    lengths = sorted({phase.phase.seq_length for phase in table})
    parts = [
        f"{human_count(plan.tokens)} tokens",
        f"sequences of {' and '.join(f'{length:,}' for length in lengths)}",
        f"{len(table)} phase{'s'[: len(table) - 1]}",
        f"{len(read)} source{'s'[: len(read) - 1]}",
        f"up to {max(use.epochs for use in read):.2f} epochs",
    ]
    text = "  ·  ".join(parts)
    figure.text(0.058, 1 - 0.67 / height, text, color=PALE_INK, va="center")
