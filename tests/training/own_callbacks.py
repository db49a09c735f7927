"""Callbacks as a user has them: outside of the package, named in a config."""

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch

from megatron_hybrid.training.callbacks import Callback

SEEN = "seen.txt"


class Seen(Callback):
    """Writes down each hook that is called, draws random numbers, and adds a figure."""

    def _write(self, run: Any, text: str) -> None:
        torch.rand(7)
        with (run.config.run_dir / SEEN).open("a") as file:
            file.write(f"{text}\n")

    def on_run_start(self, run: Any) -> None:
        self._write(run, f"start {run.progress.iteration}")

    def before_step(self, run: Any) -> None:
        self._write(run, f"before {run.progress.iteration + 1}")

    def after_step(self, run: Any, step: Any) -> None:
        self._write(run, f"after {run.progress.iteration}")

    def on_bad_step(self, run: Any, step: Any) -> None:
        self._write(run, f"bad {run.progress.iteration} {step.result.refusal}")

    def after_evaluation(self, run: Any, evaluation: Any) -> None:
        self._write(run, f"evaluated {run.progress.iteration}")

    def after_save(self, run: Any, seconds: float) -> None:
        self._write(run, f"saved {run.progress.iteration}")

    def on_run_end(self, run: Any, reason: str | None) -> None:
        self._write(run, f"end {reason}")

    def metrics(self, run: Any, step: Any) -> Mapping[str, float]:
        return {"twice_the_loss": 2 * step.result.loss}


class Weighs(Callback):
    """Writes down the sum of the parameters that the first rank has after each step."""

    def after_step(self, run: Any, step: Any) -> None:
        run.gather_parameters()
        if torch.distributed.get_rank() == 0:
            total = sum(p.double().sum().item() for p in run.model[0].parameters())
            with (run.config.run_dir / SEEN).open("a") as file:
                file.write(f"{total!r}\n")


class Fails(Callback):
    """Raises after the second step."""

    def after_step(self, run: Any, step: Any) -> None:
        if run.progress.iteration == 2:
            raise KeyError("wandb")


class NoCallback:
    """Something else."""


class Killed(Callback):
    """kill -9 before step 6, once step 5 is written."""

    def before_step(self, run: Any) -> None:
        if run.progress.iteration == 5:
            os.kill(os.getpid(), signal.SIGKILL)
