"""Draws how long documents are: the share of documents, and of tokens, at each length."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from megatron_hybrid.data.inspection.lengths import Lengths
from megatron_hybrid.human import human_count
from megatron_hybrid.plotting import COLORS, PALE_INK, STYLE, save_png, title

_BINS_PER_DOUBLING = 4
_MOST_CURVES = len(COLORS)
_ZERO = 0.75  # where a length of 0 is drawn: the scale has none


def plot_lengths(lengths: Mapping[str, Lengths], output: Path) -> None:
    """Draw what `stats.read_lengths` gave into the PNG `output`.

    More prefixes than there are colours are drawn as one curve, of all together.
    """
    names = list(lengths)
    shown = names[:-1] if len(names) > 1 else names
    if len(shown) > _MOST_CURVES:
        shown = names[-1:]
    with mpl.rc_context(STYLE):
        heading = 1.2 + 0.24 * len(shown)  # inches
        height = heading + 6.2
        figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
        panels = figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(
            left=0.07, right=0.97, top=1 - heading / height, bottom=0.6 / height, hspace=0.28
        )
        shortest = min(each.quantile(0.0) for each in lengths.values())
        edges = _edges(shortest, max(each.quantile(1.0) for each in lengths.values()))
        for color, name in zip(COLORS, shown, strict=False):
            _draw(panels, lengths[name], edges, color)
        title(panels[0], "Documents", f"share, in {_BINS_PER_DOUBLING} bins a doubling of length")
        title(panels[1], "Tokens", "share that lies in documents of that length")
        _label(panels, edges)
        _write_heading(figure, {name: lengths[name] for name in shown}, len(names))
        save_png(figure, output)


def _edges(shortest: int, longest: int) -> NDArray[np.int64]:
    """Whole lengths that grow by a constant factor where that is more than 1, around all given."""
    steps = np.arange(_BINS_PER_DOUBLING * (max(longest, 1).bit_length() + 1))
    powers = np.round(2.0 ** (steps / _BINS_PER_DOUBLING)).astype(np.int64)
    edges = np.unique(np.concatenate([[0], powers]))
    first = int(np.searchsorted(edges, shortest, side="right")) - 1
    end = int(np.searchsorted(edges, longest, side="right"))
    return edges[first : end + 1]


def _draw(panels: NDArray, lengths: Lengths, edges: NDArray[np.int64], color: str) -> None:
    drawn = np.maximum(edges, _ZERO)
    for axes, counts in zip(panels, lengths.histogram(edges), strict=True):
        shares = counts / max(int(counts.sum()), 1)
        axes.stairs(shares, drawn, fill=True, color=color, alpha=0.14)
        axes.stairs(shares, drawn, color=color, linewidth=2)
    for axes, middle in zip(panels, (lengths.quantile(0.5), lengths.mean), strict=True):
        axes.axvline(max(middle, _ZERO), color=color, linewidth=1.4, linestyle=(0, (4, 3)))


def _label(panels: NDArray, edges: NDArray[np.int64]) -> None:
    axes: Axes
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.tick_params(length=3)
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    panels[1].set_xlim(max(edges[0], _ZERO), edges[-1])
    panels[1].set_xlabel("length of a document in tokens; dashed: the median above, the mean below")


def _write_heading(figure: Figure, shown: Mapping[str, Lengths], count: int) -> None:
    height = figure.get_figheight()
    many = len(shown) < count - 1
    name = next(iter(shown)) if count == 1 else f"{count - 1} indexed files"
    figure.text(0.07, 1 - 0.35 / height, Path(name).name, fontsize=17, fontweight="bold",
                va="center")  # fmt: skip
    for index, (name, lengths) in enumerate(shown.items()):
        text = "  ·  ".join(
            [
                f"{human_count(lengths.documents)} documents",
                f"{human_count(lengths.tokens)} tokens",
                f"median {lengths.quantile(0.5):,}",
                f"mean {lengths.mean:,.0f}",
                f"longest {lengths.quantile(1.0):,}",
            ]
        )
        alone = count == 1 or many
        figure.text(
            0.07, 1 - (0.67 + 0.24 * index) / height, text if alone else f"{name}:  {text}",
            color=PALE_INK if alone else COLORS[index], va="center",
        )  # fmt: skip
