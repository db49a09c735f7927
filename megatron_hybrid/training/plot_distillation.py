"""Draws how a student comes nearer to its teacher: losses of both, divergence and agreement."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_hybrid.errors import UserError
from megatron_hybrid.plotting import COLORS, INK, PALE_INK, STYLE, save_png, title, token_axis
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import METRICS_FILE, read_records
from megatron_hybrid.training.plot import label_ends

_STUDENT, _TEACHER = COLORS[0], COLORS[3]
_FIGURES = ("lm_loss", "teacher_lm_loss", "kl", "agreement")
Columns = dict[str, np.ndarray]


def draw_distillation(run_dir: Path, output: Path) -> None:
    """Draw what `metrics.jsonl` of a run tells of student and teacher into the PNG `output`.

    Raises:
        UserError: the file is missing or damaged, or its run has no teacher.
    """
    path = run_dir / METRICS_FILE
    records = read_records(path)
    with naming(path):
        train, valid = (_columns(records, kind) for kind in ("train", "validation"))
    if not len(train["kl"]):
        raise UserError(
            f"{path} holds no step with a teacher: it is of training.objective=distillation that "
            "this is drawn"
        )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.2), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, 2, height_ratios=(1.7, 1), left=0.06, right=0.86, top=0.86, bottom=0.08,
            hspace=0.42, wspace=0.2,
        )  # fmt: skip
        panels = [figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1])]
        _draw_losses(panels[0], train, valid)
        _draw_figure(panels[1], train, valid, "kl", "Divergence", "nats per token")
        _draw_figure(panels[2], train, valid, "agreement", "Agreement", "of most likely tokens")
        token_axis(panels, float(train["tokens"][-1]))
        name = run_dir.resolve().name
        figure.text(0.02, 0.955, name, fontsize=16, fontweight="bold", color=INK)
        figure.text(0.02, 0.922, _summary(train, valid), fontsize=10.5, color=PALE_INK)
        save_png(figure, output)


def _columns(records: list[dict[str, Any]], kind: str) -> Columns:
    rows = [r for r in records if r["kind"] == kind and "teacher_lm_loss" in r.get("extra", {})]
    found = {each: np.array([r["extra"][each] for r in rows], dtype=float) for each in _FIGURES}
    return found | {"tokens": np.array([r["consumed_tokens"] for r in rows], dtype=float)}


def _draw_losses(axes: Axes, train: Columns, valid: Columns) -> None:
    ends = []
    for figure, color, name in (
        ("lm_loss", _STUDENT, "student"), ("teacher_lm_loss", _TEACHER, "teacher"),
    ):  # fmt: skip
        axes.plot(train["tokens"], train[figure], color=color, alpha=0.45, linewidth=1)
        if len(valid["tokens"]):
            axes.plot(
                valid["tokens"], valid[figure], "D:", color=color, linewidth=1, markersize=6,
                markeredgecolor="white", clip_on=False, zorder=3,
            )  # fmt: skip
        last = valid if len(valid["tokens"]) else train
        mean = float(np.mean(last[figure])) if name == "teacher" else float(last[figure][-1])
        if name == "teacher":
            axes.axhline(mean, color=color, linewidth=1.8)
        ends.append((mean, color, f"{name} "))
    label_ends(axes, float(train["tokens"][-1]), ends)
    title(axes, "Cross-entropy of the labels", "nats per token; diamonds: held-out")


def _draw_figure(
    axes: Axes, train: Columns, valid: Columns, figure: str, name: str, note: str
) -> None:
    axes.plot(train["tokens"], train[figure], color=_STUDENT, alpha=0.6, linewidth=1.2)
    axes.plot(
        valid["tokens"], valid[figure], "D", color=_STUDENT, markersize=5, clip_on=False,
        markeredgecolor="white",
    )  # fmt: skip
    axes.set_ylim(0, 1 if figure == "agreement" else None)
    title(axes, name, note)


def _summary(train: Columns, valid: Columns) -> str:
    last = valid if len(valid["tokens"]) else train
    apart = float(last["lm_loss"][-1]) - float(np.mean(last["teacher_lm_loss"]))
    return (
        f"KL {train['kl'][0]:.3f} → {last['kl'][-1]:.3f}; agreement {last['agreement'][-1]:.1%}; "
        f"{abs(apart):.3f} nats {'above' if apart > 0 else 'below'} the teacher"
    )
