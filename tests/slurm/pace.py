"""A run that waits to be hit: what happens to a job happens at a step, however fast the machine."""

import time
from typing import TYPE_CHECKING

from megatron_hybrid.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer

HIT = 10
PAUSE_S = 1.0


class Slow(Callback):
    """Takes its time for each step from step HIT on, until it has been stopped once."""

    def on_run_start(self, run: "Trainer") -> None:
        self.pause_s = 0.0 if run.progress.iteration else PAUSE_S

    def before_step(self, run: "Trainer") -> None:
        if run.progress.iteration >= HIT:
            time.sleep(self.pause_s)
