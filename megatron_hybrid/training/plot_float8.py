"""Draws how the operands of a run in emulated float8 fit the format, by linear and over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from megatron_hybrid.errors import UserError
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, token_axis
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import METRICS_FILE, read_records

ROLES = ("input", "weight", "gradient")
_SHARE = LinearSegmentedColormap.from_list("share", ["#f3f4f6", "#fde68a", "#f97316", "#7f1d1d"])
_AMAX = LinearSegmentedColormap.from_list("amax", ["#eff6ff", COLORS[0], "#172554"])
_SHARE_RANGE = (1e-5, 1.0)  # what is below is as good as none
MEASURES = {
    "amax": "largest absolute value",
    "underflow": "share that became 0",
    "saturated": "share that was cut off",
}
_ROW_INCHES = 0.17


def draw_float8(run_dir: Path, output: Path) -> None:
    """Draw `run_dir/metrics.jsonl` into the PNG `output`.

    Raises:
        UserError: there is no such file, it is damaged, or its run counted nothing.
    """
    path = run_dir / METRICS_FILE
    with naming(path):
        figure = _figure(path, run_dir.resolve().name)
    save_png(figure, output)


def _figure(path: Path, name: str) -> Figure:
    """The picture of a metrics file."""
    found = [record for record in read_records(path) if record["kind"] == "float8"]
    if not found:
        raise UserError(
            f"{path} holds no records of float8: is it a run with precision.emulate=true, of at "
            "least logging.float8_interval steps?"
        )
    names: list[str] = found[-1]["linears"]
    found = [record for record in found if record["linears"] == names]
    rows = max(1.4, _ROW_INCHES * len(names))
    height = 1.7 + 3 * (rows + 0.55)  # inches
    with mpl.rc_context(STYLE | {"axes.grid": False, "font.size": 8.5}):
        figure = Figure(figsize=(13, height), dpi=150, facecolor="white")
        panels = figure.subplots(3, 3, sharex=True, sharey=True)
        figure.subplots_adjust(
            left=0.17, right=0.95, top=1 - 1.25 / height, bottom=0.6 / height,
            hspace=0.45 / rows, wspace=0.28,
        )  # fmt: skip
        for row, role in enumerate(ROLES):
            for column, measure in enumerate(MEASURES):
                _draw_panel(panels[row, column], found, role, measure)
        panels[0, 0].set_yticks(np.arange(len(names)) + 0.5, names)
        panels[0, 0].invert_yaxis()
        for axes in panels[:, 0]:
            axes.tick_params(axis="y", length=0, labelsize=7)
        token_axis(list(panels[2]), float(found[-1]["consumed_tokens"]))
        _write_heading(figure, name, found)
    return figure


def _draw_panel(axes: Axes, found: Sequence[dict[str, Any]], role: str, measure: str) -> None:
    """Linears over tokens."""
    values = np.array([record[role][measure] for record in found], dtype=np.float64).T
    tokens = [float(record["consumed_tokens"]) for record in found]
    edges = np.array([0.0, *tokens])
    if measure == "amax":
        positive = values[values > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
        norm, colors = LogNorm(low, max(high, 2 * low)), _AMAX
        values = np.maximum(values, low)
    else:
        norm, colors = LogNorm(*_SHARE_RANGE), _SHARE
        values = np.clip(values, *_SHARE_RANGE)
    mesh = axes.pcolormesh(
        edges, np.arange(len(values) + 1), values, cmap=colors, norm=norm, rasterized=True
    )
    axes.set_title(f"{role}: {MEASURES[measure]}", loc="left", fontsize=9.5, fontweight="bold")
    place = axes.get_position()
    figure = axes.figure
    inner = figure.add_axes((place.x1 + 0.006, place.y0, 0.007, place.height))
    bar = figure.colorbar(mesh, cax=inner)
    bar.outline.set_visible(False)
    inner.tick_params(length=0, labelcolor=PALE_INK, labelsize=7)


def _write_heading(figure: Figure, name: str, found: Sequence[dict[str, Any]]) -> None:
    height, last = figure.get_figheight(), found[-1]
    figure.text(
        0.02, 1 - 0.35 / height, name, fontsize=16, fontweight="bold", va="center", color=INK
    )
    worst = {
        role: max(zip(last[role]["underflow"], last["linears"], strict=True)) for role in ROLES
    }
    parts = [f"emulated float8, {len(last['linears'])} linears"] + [
        f"most {role}s lost: {share:.2%} in {linear}" for role, (share, linear) in worst.items()
    ]
    figure.text(0.02, 1 - 0.66 / height, "  ·  ".join(parts), color=PALE_INK, va="center")
