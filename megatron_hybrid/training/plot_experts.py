"""Draws where a run's tokens went: the load of each MoE layer over time, and of each expert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from megatron_hybrid.errors import UserError
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, title, token_axis
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import METRICS_FILE, read_records

# From the busiest expert's even share (white) up.
_BUSY = LinearSegmentedColormap.from_list("busy", ["#ffffff", "#fde68a", "#f97316", "#7f1d1d"])
# Below an even share blue, above it orange.
_SHARE = LinearSegmentedColormap.from_list("share", [COLORS[0], "#ffffff", "#ea580c"])
_LAYER_INCHES, _MOST_COLUMNS = 0.3, 400
_AVERAGED = 5  # of the last records of shares, against the noise of a single step


def draw_expert_load(run_dir: Path, output: Path) -> None:
    """Draw `run_dir/metrics.jsonl` into the PNG `output`.

    Raises:
        UserError: there is no such file, it is damaged, or its run has no experts.
    """
    path = run_dir / METRICS_FILE
    with naming(path):
        figure = _figure(path, run_dir.resolve().name)
    save_png(figure, output)


def _figure(path: Path, name: str) -> Figure:
    """The picture of a metrics file."""
    records = read_records(path)
    steps = [r for r in records if r["kind"] == "train" and r.get("expert_load")]
    if not steps:
        raise UserError(f"{path} holds no load of experts: is it the run of a MoE model?")
    shares = [r for r in records if r["kind"] == "expert_load"]
    layers: list[int] = steps[0]["expert_load"]["layers"]
    tokens = np.array([step["consumed_tokens"] for step in steps], dtype=np.float64)
    busy = np.array([step["expert_load"]["max_over_mean"] for step in steps]).T
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        rows = max(1.6, _LAYER_INCHES * len(layers))
        height = 1.9 + rows + (rows + 1.2 if shares else 0)  # inches
        figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
        panels = figure.subplots(2 if shares else 1, 1, squeeze=False)[:, 0]
        figure.subplots_adjust(
            left=0.075, right=0.93, top=1 - 1.15 / height, bottom=0.55 / height, hspace=0.85 / rows
        )
        _draw_busy(panels[0], layers, tokens, busy)
        if shares:
            _draw_shares(panels[1], layers, shares)
        _write_heading(figure, name, steps, busy)
    return figure


def _draw_busy(axes: Axes, layers: Sequence[int], tokens: np.ndarray, busy: np.ndarray) -> None:
    """Layers over tokens: the busiest expert's tokens over the mean, several steps in a column."""
    columns = np.array_split(np.arange(len(tokens)), min(len(tokens), _MOST_COLUMNS))
    values = np.stack([busy[:, column].mean(axis=1) for column in columns], axis=1)
    # A run that goes on from another one's checkpoint does not begin at 0.
    begin = max(0.0, 2 * tokens[0] - tokens[1]) if len(tokens) > 1 else 0.0
    edges = np.array([begin, *(tokens[column[-1]] for column in columns)])
    top = max(2.0, float(np.nanpercentile(values, 99.5)))
    mesh = axes.pcolormesh(
        edges, np.arange(len(layers) + 1), values, cmap=_BUSY, vmin=1.0, vmax=top
    )
    title(axes, "Busiest expert of each layer", "its tokens, as a multiple of an even share")
    token_axis([axes], float(tokens[-1]))
    _label_layers(axes, layers)
    _color_bar(axes, mesh)


def _draw_shares(axes: Axes, layers: Sequence[int], shares: Sequence[dict[str, Any]]) -> None:
    """Layers by experts: shares of the tokens at the end, busiest first in each layer."""
    counts = np.array([len(row) for row in shares[-1]["shares"]])
    experts = int(counts.max())
    # A layer of fewer experts has nothing in its last columns.
    rows = [
        [row + [np.nan] * (experts - len(row)) for row in record["shares"]]
        for record in shares[-_AVERAGED:]
    ]
    values = -np.sort(-np.mean(rows, axis=0), axis=1) * counts[:, None]
    mesh = axes.pcolormesh(
        np.arange(experts + 1), np.arange(len(layers) + 1), values, cmap=_SHARE,
        norm=TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(values)))),
        edgecolors="white", linewidth=0.4 if experts <= 64 else 0.0,
    )  # fmt: skip
    for row, dead in enumerate((values == 0).sum(axis=1)):
        if dead:
            axes.annotate(
                f"{dead} dead", (counts[row], row + 0.5),
                xytext=(-4, 0), textcoords="offset points", ha="right", va="center",
                color="white", fontweight="bold", fontsize=8,
            )  # fmt: skip
    count = len(shares[-_AVERAGED:])
    when = f"mean of the last {count} records" if count > 1 else "in the last record"
    title(axes, "Experts at the end", f"share of a layer's tokens, 1 is even; {when}")
    axes.set_xlabel("experts, the busiest of each layer first")
    _label_layers(axes, layers)
    _color_bar(axes, mesh)


def _label_layers(axes: Axes, layers: Sequence[int]) -> None:
    axes.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    axes.tick_params(length=0)
    axes.set_ylabel("layer")
    axes.invert_yaxis()


def _color_bar(axes: Axes, mesh: Any) -> None:
    figure = axes.figure
    place = axes.get_position()
    inner = figure.add_axes((place.x1 + 0.012, place.y0, 0.012, place.height))
    bar = figure.colorbar(mesh, cax=inner)
    bar.outline.set_visible(False)
    inner.tick_params(length=0, labelcolor=PALE_INK)


def _write_heading(
    figure: Figure, name: str, steps: Sequence[dict[str, Any]], busy: np.ndarray
) -> None:
    height, last = figure.get_figheight(), steps[-1]["expert_load"]
    figure.text(
        0.075, 1 - 0.35 / height, name, fontsize=17, fontweight="bold", va="center", color=INK
    )
    parts = [
        f"{len(last['layers'])} MoE layers, {len(steps):,} steps",
        f"busiest expert {busy[:, 0].mean():.2f} → {busy[:, -1].mean():.2f} x mean",
        f"dead {sum(last['dead'])}",
        f"dropped {max(last['dropped']):.1%}",
    ]
    text = "  ·  ".join(parts)
    figure.text(0.075, 1 - 0.67 / height, text, color=PALE_INK, va="center")
