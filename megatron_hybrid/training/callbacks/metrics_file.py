"""`metrics.jsonl`: a line for everything that a run reports; `training/metrics.py` says which."""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from megatron_hybrid.training.callbacks.base import Callback, Evaluation, Step
from megatron_hybrid.training.metrics import METRICS_FILE, truncate_after

if TYPE_CHECKING:
    from megatron_hybrid.training.step_metrics import StepMetrics
    from megatron_hybrid.training.trainer import Trainer


# The file's time says when the last step was done, so near.
SIGN_OF_LIFE_S = 5.0


class MetricsFile(Callback):
    """Appends to the file.

    A run that was killed has steps in its file which are newer than its last checkpoint, and
    possibly half a line. They are moved to REWOUND_FILE first, so that after the resumed run the
    file holds what an uninterrupted run would have written (`TIMING_FIELDS` and events apart).
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._signed = 0.0

    def on_run_start(self, run: "Trainer") -> None:
        """Open the file.

        Raises:
            UserError: the existing one is damaged before its last line.
        """
        folder = run.config.run_dir
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        truncate_after(path, run.progress.iteration)
        # Unbuffered: a line is one write, which a killed process leaves whole or not at all.
        self._file = path.open("ab", buffering=0)

    def after_step(self, run: "Trainer", step: Step) -> None:
        # Of steps between those that are recorded (`training.log_interval`) it is the only one.
        if not step.due and time.monotonic() - self._signed >= SIGN_OF_LIFE_S:
            assert self._file is not None
            os.utime(self._file.fileno())
            self._signed = time.monotonic()

    def on_metrics(self, run: "Trainer", metrics: "StepMetrics") -> None:
        self._write(metrics.record())

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        record = {
            "kind": "validation",
            "iteration": run.progress.iteration,
            "consumed_samples": run.progress.consumed_samples,
            "consumed_tokens": run.consumed_tokens(),
            "loss": evaluation.loss,
            "extra": dict(evaluation.extra),
        }
        self._write(record)

    def on_record(self, run: "Trainer", kind: str, record: Mapping[str, Any]) -> None:
        self._write({"kind": kind, **record})

    def on_event(self, run: "Trainer", iteration: int, name: str, message: str) -> None:
        self._write({"kind": "event", "iteration": iteration, "name": name, "message": message})

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        assert self._file is not None
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
