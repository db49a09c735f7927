"""The console: a line a step, evaluation and event."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_hybrid.training.callbacks.base import Callback, Evaluation
from megatron_hybrid.training.console import RunConsole
from megatron_hybrid.training.metrics import TASKS, scalars

if TYPE_CHECKING:
    from megatron_hybrid.training.step_metrics import StepMetrics
    from megatron_hybrid.training.trainer import Trainer


class Console(Callback):
    """Prints what people watch."""

    def __init__(self) -> None:
        self._console: RunConsole | None = None

    def on_run_start(self, run: "Trainer") -> None:
        self._console = RunConsole(run.total_iterations, completed=run.progress.iteration)

    def on_metrics(self, run: "Trainer", metrics: "StepMetrics") -> None:
        assert self._console is not None
        self._console.step(metrics)

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        assert self._console is not None
        self._console.validation(run.progress.iteration, run.consumed_tokens(), evaluation)

    def on_record(self, run: "Trainer", kind: str, record: Mapping[str, Any]) -> None:
        assert self._console is not None
        if kind == TASKS:
            figures = scalars({"kind": kind, **record}).items()
            told = [f"{name} {value:.4f}" for name, value in figures if "_stderr" not in name]
            self._console.line(f"iteration {run.progress.iteration}: {', '.join(told)}")

    def on_event(self, run: "Trainer", iteration: int, name: str, message: str) -> None:
        assert self._console is not None
        self._console.line(message)

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        """Take the progress bar off the terminal."""
        assert self._console is not None
        self._console.close()
