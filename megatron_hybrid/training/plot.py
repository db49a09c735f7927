"""Draws what a run's metrics file holds: loss, learning rate and throughput over tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_hybrid.errors import UserError
from megatron_hybrid.human import human_count, human_duration
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, title, token_axis
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import METRICS_FILE, read_records, seconds_of_steps

_VALIDATION_COLOR = "#ea580c"
_LETTER_WIDTH = 0.009  # of the width of the loss panel


@dataclass(frozen=True)
class Run:
    """The metrics of one run as float64 arrays, one value a step or evaluation.

    Attributes:
        phases: where each phase of the data begins, in tokens, and its name; empty if there is one.
    """

    name: str
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    phases: list[tuple[float, str]]


def load_run(run_dir: Path) -> Run:
    """Read `run_dir/metrics.jsonl`.

    Raises:
        UserError: the file is missing, damaged before its last line, or has no training step yet.
    """
    path = run_dir / METRICS_FILE
    records = read_records(path)
    names = ("iteration", "consumed_tokens", "loss")
    timing = ("learning_rate", "tokens_per_s", "step_ms")
    with naming(path):
        train = _columns(records, "train", (*names, *timing))
        validation, phases = _columns(records, "validation", names), _phases(records)
    if not len(train["iteration"]):
        raise UserError(f"{path} holds no training step yet: there is nothing to draw")
    return Run(run_dir.resolve().name, train, validation, phases)


def _phases(records: list[dict[str, Any]]) -> list[tuple[float, str]]:
    found: list[tuple[float, str]] = []
    tokens = 0
    for record in records:
        if record["kind"] == "train":
            name = record.get("phase")  # runs of earlier versions do not say
            if name is not None and (not found or name != found[-1][1]):
                found.append((tokens, name))
            tokens = record["consumed_tokens"]
    return found


def _columns(
    records: list[dict[str, Any]], kind: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    rows = [record for record in records if record["kind"] == kind]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}


def plot_runs(run_dirs: Sequence[Path], output: Path) -> None:
    """Draw one or several runs, overlaid, into the PNG `output`.

    Raises:
        UserError: as `load_run`; nothing is written then.
    """
    runs = [load_run(run_dir) for run_dir in run_dirs]
    with mpl.rc_context(STYLE):
        heading = 1.6 if len(runs) == 1 else 1.2 + 0.24 * len(runs)  # inches
        height = heading + 6
        figure = Figure(figsize=(11, height), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, 2, height_ratios=(2.2, 1), left=0.052, right=0.862, top=1 - heading / height,
            bottom=0.55 / height, hspace=0.42, wspace=0.14,
        )  # fmt: skip
        panels = [figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1])]
        _draw_loss(panels[0], runs)
        _draw_learning_rate(panels[1], runs)
        _draw_throughput(panels[2], runs)
        _label_tokens(panels, runs)
        if len(runs) == 1:
            _mark_phases(panels, runs[0])
            _add_iteration_axis(panels[0], runs[0])
        _write_heading(figure, runs)
        save_png(figure, output)


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over up to `reach` neighbours on each side; NaN (a step that diverged) is left out.

    At the start, where a loss is steep, the window stays symmetric, which keeps it on the curve;
    at the end it looks back only, which makes the last value a mean worth quoting.
    """
    count = len(values)
    index = np.arange(count)
    first = np.maximum(index - reach, 0)
    last = np.minimum(index + np.minimum(reach, index), count - 1) + 1
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    inside = counts[last] - counts[first]
    mean = (sums[last] - sums[first]) / np.maximum(inside, 1)
    return np.where(inside > 0, mean, np.nan)


def _smoothed_loss(run: Run) -> np.ndarray:
    return _smooth(run.train["loss"], reach=max(1, len(run.train["loss"]) // 40))


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    alone = len(runs) == 1
    ends = []
    for index, run in enumerate(runs):
        tokens, color = run.train["consumed_tokens"], _color(index)
        smooth = _smoothed_loss(run)
        axes.plot(tokens, run.train["loss"], color=color, alpha=0.25, linewidth=1)
        axes.plot(tokens, smooth, color=color, linewidth=2.2)
        axes.plot(tokens[-1], smooth[-1], "o", color=color, markersize=6, clip_on=False)
        ends.append((float(smooth[-1]), color, "train " if alone else ""))
        if len(run.validation["loss"]):
            color = _VALIDATION_COLOR if alone else color
            axes.plot(
                run.validation["consumed_tokens"], run.validation["loss"], "D:", color=color,
                linewidth=1, markersize=6, markeredgecolor="white", clip_on=False, zorder=3,
            )  # fmt: skip
            if alone:
                ends.append((float(run.validation["loss"][-1]), color, "validation "))
    if alone:
        title(axes, "Loss", "nats per token", pad=29)  # above the step axis
    else:
        title(axes, "Loss", "nats per token; lines: train, diamonds: validation")
    low, high = axes.get_ylim()
    if high - low < 0.1:  # do not show noise as if it were progress
        axes.set_ylim(low - 0.05, high + 0.05)
    label_ends(axes, _last_token(runs), ends)


def label_ends(axes: Axes, end: float, ends: list[tuple[float, str, str]]) -> None:
    """Write each curve's last value to its right, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    position = math.inf
    for value, color, name in sorted(ends, reverse=True):
        if math.isfinite(value):
            position = min(value, position - (high - low) * 0.065)
            axes.annotate(
                f"{name}{value:.3f}", (end, position), xytext=(11, 0), textcoords="offset points",
                color=color, va="center", fontweight="bold", annotation_clip=False,
            )  # fmt: skip


def _draw_learning_rate(axes: Axes, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        axes.plot(
            run.train["consumed_tokens"], run.train["learning_rate"], color=_color(index),
            linewidth=2, marker="o", markevery=[-1], clip_on=False,
        )  # fmt: skip
    peak = max(float(np.max(run.train["learning_rate"])) for run in runs)
    exponent = math.floor(math.log10(peak)) if peak > 0 else 0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate / 10**exponent:g}"))
    axes.set_ylim(0, peak * 1.12 or 1)
    title(axes, "Learning rate", f"$\\times 10^{{{exponent}}}$")


def _draw_throughput(axes: Axes, runs: Sequence[Run]) -> None:
    top, ends = 0.0, []
    for index, run in enumerate(runs):
        tokens, speed, color = (
            run.train["consumed_tokens"],
            run.train["tokens_per_s"],
            _color(index),
        )
        median = float(np.median(speed))
        axes.plot(tokens, speed, color=color, alpha=0.45, linewidth=1)
        axes.axhline(median, color=color, linewidth=1.6, linestyle=(0, (4, 3)))
        ends.append((median, color))
        top = max(top, float(np.percentile(speed, 99)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_ylim(0, top * 1.15 or 1)
    title(axes, "Throughput", "tokens/s, all ranks")
    for median, color in ends:
        axes.annotate(
            f"median {human_count(median)}", (_last_token(runs), median), xytext=(11, 0),
            textcoords="offset points", color=color, va="center", fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip


def _tick(value: float) -> str:
    return human_count(value).replace(".0", "")


def _last_token(runs: Sequence[Run]) -> float:
    return max(float(run.train["consumed_tokens"][-1]) for run in runs)


def _label_tokens(panels: Sequence[Axes], runs: Sequence[Run]) -> None:
    token_axis(panels, _last_token(runs))


def _mark_phases(panels: Sequence[Axes], run: Run) -> None:
    """A line where each later phase of the data begins; names where there is room for them."""
    end = run.train["consumed_tokens"][-1]
    for (start, name), (next_start, _) in pairwise([*run.phases, (end, "")]):
        for axes in panels if start else ():
            axes.axvline(start, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if (next_start - start) / end > _LETTER_WIDTH * (len(name) + 1):
            panels[0].annotate(
                name, ((start + next_start) / 2, 1), xytext=(0, -4), textcoords="offset points",
                xycoords=("data", "axes fraction"), color=PALE_INK, ha="center", va="top",
            )  # fmt: skip


def _add_iteration_axis(axes: Axes, run: Run) -> None:
    """Ticks at the top, each where that step ended; also right where the batch size changed."""
    iteration, tokens = run.train["iteration"], run.train["consumed_tokens"]
    ticks = np.asarray(MaxNLocator(nbins=8, integer=True).tick_values(0, iteration[-1]))
    ticks = ticks[(ticks >= 0) & (ticks <= iteration[-1])]
    places = np.interp(ticks, np.append(0, iteration), np.append(0, tokens))
    top = axes.twiny()
    top.set_xlim(axes.get_xlim())
    top.set_xticks(places, [f"{tick:,.0f}" for tick in ticks])
    top.tick_params(length=3)
    top.grid(False)
    top.spines["top"].set_visible(True)
    top.annotate(
        "steps", (1, 1), xytext=(26, 8.5), textcoords="offset points", xycoords="axes fraction",
        color=PALE_INK, annotation_clip=False,
    )  # fmt: skip


def _write_heading(figure: Figure, runs: Sequence[Run]) -> None:
    height = figure.get_figheight()
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    figure.text(0.052, 1 - 0.35 / height, title, fontsize=17, fontweight="bold", va="center")
    for index, run in enumerate(runs):
        text = _summary(run) if len(runs) == 1 else f"{run.name}:  {_summary(run)}"
        color = PALE_INK if len(runs) == 1 else _color(index)
        figure.text(0.052, 1 - (0.67 + 0.24 * index) / height, text, color=color, va="center")


def _summary(run: Run) -> str:
    """One line of final figures."""
    train, steps = run.train, int(run.train["iteration"][-1])
    # A run that goes on from another one's checkpoint does not begin at 0.
    between = float(np.median(np.diff(train["iteration"]))) if len(train["iteration"]) > 1 else 1.0
    first = max(0.0, train["iteration"][0] - between)
    seconds = seconds_of_steps(train["iteration"], train["step_ms"], after=first)
    parts = [
        f"{human_count(train['consumed_tokens'][-1])} tokens in {steps:,} step{'s'[: steps - 1]}",
        f"loss {train['loss'][0]:.2f} → {_smoothed_loss(run)[-1]:.2f}",
        f"{human_duration(seconds)} of training",
    ]
    if len(run.validation["loss"]):
        parts.insert(2, f"validation {run.validation['loss'][-1]:.2f}")
    return "  ·  ".join(parts)
