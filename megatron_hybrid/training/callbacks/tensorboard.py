"""TensorBoard: the figures of steps and evaluations in `run_dir/tensorboard`."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hybrid.training.callbacks.base import Callback, Evaluation
from megatron_hybrid.training.metrics import TENSORBOARD_FOLDER, scalars

if TYPE_CHECKING:
    from megatron_hybrid.training.step_metrics import StepMetrics
    from megatron_hybrid.training.trainer import Trainer


class TensorBoard(Callback):
    """Writes event files."""

    def __init__(self) -> None:
        self._events: _EventFile | None = None

    def on_run_start(self, run: "Trainer") -> None:
        self._events = _EventFile(run.config.run_dir / TENSORBOARD_FOLDER, run.progress.iteration)

    def on_metrics(self, run: "Trainer", metrics: "StepMetrics") -> None:
        self._write(metrics.iteration, metrics.record())

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        found = {"kind": "validation", "loss": evaluation.loss, "extra": evaluation.extra}
        self._write(run.progress.iteration, found)

    def on_record(self, run: "Trainer", kind: str, record: Mapping[str, Any]) -> None:
        self._write(run.progress.iteration, {"kind": kind, **record})

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        assert self._events is not None
        self._events.close()

    def _write(self, step: int, record: Mapping[str, Any]) -> None:
        assert self._events is not None
        if values := scalars(record):
            self._events.write(step, values)


class _EventFile:
    """A TensorBoard event file, written without the thread that TensorBoard's own writer starts.

    Threads and the forks of data loaders and checkpoint writers do not go well together.
    """

    def __init__(self, folder: Path, resume_iteration: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._new_event, self._new_summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((folder / name).open("xb"))
        self._append(self._new_event(wall_time=time.time(), file_version="brain.Event:2"))
        # Tells the reader to forget what earlier files hold of the steps that run again.
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(
            self._new_event(wall_time=time.time(), step=resume_iteration + 1, session_log=restart)
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        value = self._new_summary.Value
        summary = self._new_summary(
            value=[value(tag=tag, simple_value=scalar) for tag, scalar in scalars.items()]
        )
        self._append(self._new_event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._records.close()

    def _append(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
