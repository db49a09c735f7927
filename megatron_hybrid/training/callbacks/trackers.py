"""Weights & Biases and MLflow: each has a process that copies `metrics.jsonl` there."""

import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from launchers.environment import own_code
from megatron_hybrid.training.callbacks.base import Callback
from megatron_hybrid.training.trackers.base import Target
from megatron_hybrid.training.trackers.follow import PREFIX, start_line
from megatron_hybrid.training.trackers.targets import targets

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0  # at the end of a run, for what has not been sent


class Trackers(Callback):
    """Starts the processes, and tells them of the end. Must come after `MetricsFile`."""

    def __init__(self) -> None:
        self._processes: list[tuple[Target, subprocess.Popen[bytes]]] = []

    def on_run_start(self, run: "Trainer") -> None:
        for target in targets(run.config, run.progress.iteration):
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_hybrid.training.trackers.follow"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | own_code(os.environ),
                    start_new_session=True,  # Ctrl-C is for the run
                )
                assert process.stdin is not None
                process.stdin.write(start_line(target))
                process.stdin.flush()
            except OSError as error:
                logger.warning(
                    "%s: its process cannot be started (%s); the next start of the run sends all",
                    *(target.kind, error),
                )
            else:
                self._processes.append((target, process))

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        last = f"{PREFIX}{reason}\n" if reason else ""
        for target, process in self._processes:
            try:
                process.communicate(last.encode(), timeout=_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                logger.warning(
                    "%s has not got everything after %g s; `megatron-hybrid track %s` sends the "
                    "rest",
                    *(target.kind, _PATIENCE_S, target.run_dir),
                )
