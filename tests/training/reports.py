"""What a run reports, written down without a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_hybrid.config.sections import LoggingConfig
from megatron_hybrid.training.callbacks.base import Evaluation
from megatron_hybrid.training.callbacks.ordered import Callbacks, reporters
from megatron_hybrid.training.step_metrics import StepMetrics


class Reports:
    """The callbacks that write, and the few things of a run that they ask for."""

    def __init__(
        self, folder: Path, *, enabled: bool, tensorboard: bool, resumed: int, total: int
    ) -> None:
        config: Any = SimpleNamespace(
            run_dir=folder, logging=LoggingConfig(tensorboard=tensorboard)
        )
        self.run: Any = SimpleNamespace(
            config=config,
            progress=SimpleNamespace(iteration=resumed, consumed_samples=0),
            total_iterations=total,
            reason="finished",
        )
        self.callbacks = Callbacks(reporters(config) if enabled else [], [])

    def train(self, metrics: StepMetrics) -> None:
        self.callbacks.on_metrics(self.run, metrics)

    def validation(self, iteration: int, samples: int, tokens: int, loss: float) -> None:
        self.run.progress = SimpleNamespace(iteration=iteration, consumed_samples=samples)
        self.run.consumed_tokens = lambda: tokens
        self.callbacks.after_evaluation(self.run, Evaluation(loss, is_cross_entropy=True))

    def event(self, iteration: int, name: str, message: str) -> None:
        self.callbacks.on_event(self.run, iteration, name, message)


@contextmanager
def reports(
    folder: Path,
    *,
    enabled: bool = True,
    tensorboard: bool = False,
    resume_iteration: int = 0,
    total_iterations: int,
) -> Iterator[Reports]:
    """Those of a run that goes on after `resume_iteration`, for as long as the block."""
    found = Reports(
        folder, enabled=enabled, tensorboard=tensorboard, resumed=resume_iteration,
        total=total_iterations,
    )  # fmt: skip
    with found.callbacks.running(found.run):
        yield found
