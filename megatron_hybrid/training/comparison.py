"""Two runs of the same samples, step by step: where they part, how far, and at what speed."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hybrid.errors import UserError
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, title
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import METRICS_FILE, read_records

_FLOOR = 1e-9  # of the picture of differences; equal values lie there
_LEVELS = (1e-6, 1e-3)  # relative differences of the loss whose first step is told
_FIELDS = ("iteration", "consumed_tokens", "loss", "grad_norm", "step_ms")


@dataclass(frozen=True)
class Comparison:
    """Training steps that both runs have.

    Attributes:
        names: of the two.
        steps: their numbers, `[n]`.
        loss, grad_norm, step_ms: `[2, n]`, float64; NaN where a value was not finite.
    """

    names: tuple[str, str]
    steps: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    step_ms: np.ndarray

    def difference(self, field: str) -> np.ndarray:
        """|b - a| / |a| of each step, `[n]`; 0 where both are the same, or not finite."""
        first, second = getattr(self, field)
        both = np.isnan(first) & np.isnan(second)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.abs(second - first) / np.abs(first)
        relative = np.where(np.isnan(relative), np.inf, relative)
        return np.where((first == second) | both, 0.0, relative)

    @property
    def worst(self) -> float:
        """The largest relative difference of a step's loss."""
        return float(self.difference("loss").max())

    def parts_at(self, above: float) -> int | None:
        """The first step whose loss or gradient norm differs by more, relatively; None: none."""
        apart = np.maximum(self.difference("loss"), self.difference("grad_norm")) > above
        return int(self.steps[apart.argmax()]) if apart.any() else None

    @property
    def time_ratio(self) -> float:
        """Median step time of the second over the first's; the first step is left out."""
        first, second = np.median(self.step_ms[:, 1:] if len(self.steps) > 1 else self.step_ms, 1)
        return float(second / first)

    def lines(self) -> list[str]:
        """What there is to say, for people."""
        at = self.parts_at(0)
        if at is None:
            found = [f"the same numbers in all {len(self.steps)} steps, to the last bit"]
        else:
            before = max(self.steps[self.steps < at], default=self.steps[0] - 1)
            # Of the steps between, nothing is recorded (`training.log_interval`).
            parted = "they part at" if before == at - 1 else "they have parted by"
            found = [f"the same numbers up to step {before}; {parted} step {at}"]
            found += [
                f"more than {level:g} apart from step {step} on"
                for level in _LEVELS
                if (step := self.parts_at(level)) is not None
            ]
            last = self.loss[:, -1]
            found.append(
                f"loss at step {self.steps[-1]}: {last[0]:.6f} and {last[1]:.6f}; worst step "
                f"{self.worst:.1e} apart"
            )
        return [*found, f"step time: {self.time_ratio:.3f} of {self.names[0]}'s (medians)"]


def compare(first: Path, second: Path, names: tuple[str, str]) -> Comparison:
    """The steps that both runs have.

    Raises:
        UserError: a run has no metrics, they have no step in common, or one of these steps is of
            other samples.
    """
    runs = [_steps(run_dir) for run_dir in (first, second)]
    common = sorted(runs[0].keys() & runs[1].keys())
    if not common:
        raise UserError(f"{first} and {second} have no training step in common")
    for step in common:
        tokens = [run[step][1] for run in runs]
        if tokens[0] != tokens[1]:
            raise UserError(
                f"step {step} comes after {tokens[0]:.0f} tokens in {names[0]} and after "
                f"{tokens[1]:.0f} in {names[1]}: batches of other sizes cannot be compared"
            )
    values = np.array([[run[step] for step in common] for run in runs], dtype=np.float64)
    columns = {name: values[:, :, place] for place, name in enumerate(_FIELDS)}
    return Comparison(
        names, np.array(common), columns["loss"], columns["grad_norm"], columns["step_ms"]
    )


def _steps(run_dir: Path) -> dict[int, tuple[float | None, ...]]:
    path = run_dir / METRICS_FILE
    records = [record for record in read_records(path) if record["kind"] == "train"]
    with naming(path):
        return {r["iteration"]: tuple(r[name] for name in _FIELDS) for r in records}


def draw_comparison(found: Comparison, output: Path) -> None:
    """Losses, how far they and the gradient norms are apart, and step times, into a PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 8), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, 2, left=0.062, right=0.965, top=0.845, bottom=0.075, hspace=0.42, wspace=0.2
        )
        panels = [figure.add_subplot(grid[place // 2, place % 2]) for place in range(4)]
        for panel, field, name, unit in (
            (panels[0], "loss", "Loss", "nats per token"),
            (panels[2], "grad_norm", "Gradient norm", "before clipping"),
            (panels[3], "step_ms", "Step time", "ms"),
        ):
            _draw_both(panel, found, field)
            title(panel, name, unit)
        panels[3].set_ylim(0, float(np.percentile(found.step_ms, 98)) * 1.15)
        _draw_difference(panels[1], found)
        for panel in panels:
            panel.set_xlabel("step")
            panel.tick_params(length=3)
        for index, name in enumerate(found.names):
            figure.text(0.062 + 0.45 * index, 0.962, name, color=COLORS[index], fontweight="bold")
        *lines, last = found.lines()
        text = "\n".join(filter(None, ["; ".join(lines[:2]), "; ".join([*lines[2:], last])]))
        figure.text(0.062, 0.945, text, color=PALE_INK, fontsize=9, va="top", linespacing=1.4)
        save_png(figure, output)


def _draw_both(axes: Axes, found: Comparison, field: str) -> None:
    for index, values in enumerate(getattr(found, field)):
        # The second, thinner, lies on the first where they are equal.
        axes.plot(found.steps, values, color=COLORS[index], linewidth=(3.2, 1.4)[index], zorder=2)


def _draw_difference(axes: Axes, found: Comparison) -> None:
    for field, color, name in (("loss", INK, "loss"), ("grad_norm", PALE_INK, "gradient norm")):
        values = np.clip(found.difference(field), _FLOOR, 1e3)
        axes.plot(found.steps, values, color=color, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.set_ylim(_FLOOR / 2, None)
    axes.legend(frameon=False, loc="lower right")
    title(axes, "How far apart", f"relative; the lowest line: equal, or below {_FLOOR:g}")
