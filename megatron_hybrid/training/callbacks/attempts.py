"""What becomes of this start of a run, in `attempts.jsonl`."""

from typing import TYPE_CHECKING

from megatron_hybrid.training.callbacks.base import Callback
from megatron_hybrid.training.metrics import rewound_steps

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer


class Attempts(Callback):
    """Writes the moments from which `status` tells what a scheduler's restarts came to."""

    def on_run_start(self, run: "Trainer") -> None:
        iteration = run.progress.iteration
        run.attempt.training(iteration, *rewound_steps(run.config.run_dir, iteration))

    def after_save(self, run: "Trainer", seconds: float) -> None:
        run.attempt.checkpoint(run.progress.iteration, seconds)

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        if reason is not None:
            run.attempt.end(run.progress.iteration, reason)
