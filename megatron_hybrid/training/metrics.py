"""What a run reports of itself: a JSONL file, TensorBoard, and the console.

`metrics.jsonl` has one JSON object a line, its `kind` one of
  "train"       a training step: the fields of `StepMetrics`
  "validation"  an evaluation:   iteration, consumed_samples, consumed_tokens, loss, extra
  "expert_load" MoE: of a step's tokens, each expert's share: iteration, consumed_tokens, layers,
                shares by layer and expert
  "float8"      emulated float8: iteration, consumed_tokens, and how each linear's operands fit
                the format (`float8_fit.summary`)
  "event"       anything else:   iteration, name, message
in the order in which they happened. Floats are written with all their digits, so that two runs
can be compared bit for bit; NaN and infinities, which JSON does not have, are written as null.
"""

import os
import resource
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import orjson

from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.console import RunConsole
from megatron_hybrid.training.step_metrics import StepMetrics

if TYPE_CHECKING:
    import torch

    from megatron_hybrid.training.expert_load import ExpertLoad

METRICS_FILE = "metrics.jsonl"
REWOUND_FILE = "metrics_rewound.jsonl"  # steps that were done again, as they were before
TENSORBOARD_FOLDER = "tensorboard"

_TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "consumed_tokens": "progress/consumed_tokens",
    "tokens_per_s": "throughput/tokens_per_s",
    "model_tflops_per_rank": "throughput/model_tflops_per_rank",
    "step_ms": "throughput/step_ms",
    "peak_memory_gib": "memory/peak_gib",
}


class MetricsWriter:
    """Writes a run's metrics; on all ranks but the one that reports, every call does nothing.

    A run that was killed has steps in its files which are newer than its last checkpoint, and
    possibly half a line. Opening the writer moves them to REWOUND_FILE, so that after the resumed
    run the file holds what an uninterrupted run would have written (`TIMING_FIELDS` and events
    apart).

    Args:
        run_dir: the run's folder; created if missing.
        enabled: whether this rank reports (one rank of a run does).
        tensorboard: also write TensorBoard event files into `run_dir/tensorboard`.
        resume_iteration: steps that the loaded checkpoint holds; 0 for a fresh run.
        total_iterations: steps that the whole run will have done at its end.

    Raises:
        UserError: the existing metrics file is damaged before its last line.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        enabled: bool,
        tensorboard: bool,
        resume_iteration: int,
        total_iterations: int,
    ) -> None:
        self._file: BinaryIO | None = None
        self._events: _EventFile | None = None
        self._console: RunConsole | None = None
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        truncate_after(path, resume_iteration)
        # Unbuffered: a line is one write, which a killed process leaves whole or not at all.
        self._file = path.open("ab", buffering=0)
        if tensorboard:
            self._events = _EventFile(run_dir / TENSORBOARD_FOLDER, resume_iteration)
        self._console = RunConsole(total_iterations, completed=resume_iteration)

    def train(self, metrics: StepMetrics) -> None:
        """Report one training step."""
        if self._console is None:
            return
        values = {item.name: getattr(metrics, item.name) for item in fields(metrics)}
        plain: dict[str, Any] = {
            name: dict(value) for name, value in values.items() if isinstance(value, Mapping)
        }
        load = metrics.expert_load
        plain["expert_load"] = None if load is None else load.summary()
        self._write("train", values | plain)
        if self._events is not None:
            scalars = {tag: getattr(metrics, name) for name, tag in _TENSORBOARD_TAGS.items()}
            scalars |= {f"train/{name}": value for name, value in metrics.extra.items()}
            scalars |= {f"data/tokens/{name}": n for name, n in metrics.source_tokens.items()}
            scalars |= {f"data/epochs/{name}": n for name, n in metrics.source_epochs.items()}
            scalars |= {} if load is None else load.scalars()
            self._events.write(metrics.iteration, scalars)
        self._console.step(metrics)

    def expert_load(self, iteration: int, consumed_tokens: int, load: "ExpertLoad") -> None:
        """Record each expert's share of the tokens of a step."""
        if self._console is None:
            return
        record = {
            "iteration": iteration,
            "consumed_tokens": consumed_tokens,
            "layers": list(load.layers),
            "shares": [[round(share, 6) for share in row] for row in load.shares.tolist()],
        }
        self._write("expert_load", record)

    def float8(self, iteration: int, consumed_tokens: int, fits: Mapping[str, Any]) -> None:
        """Record how operands fit in float8, as `float8_fit.summary` tells it."""
        if self._console is not None:
            place = {"iteration": iteration, "consumed_tokens": consumed_tokens}
            self._write("float8", place | dict(fits))

    def validation(
        self,
        iteration: int,
        consumed_samples: int,
        consumed_tokens: int,
        loss: float,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Report the mean loss, in nats a token, on the validation split."""
        if self._console is None:
            return
        record = {
            "iteration": iteration,
            "consumed_samples": consumed_samples,
            "consumed_tokens": consumed_tokens,
            "loss": loss,
            "extra": dict(extra or {}),
        }
        self._write("validation", record)
        if self._events is not None:
            scalars = {"loss": loss, **(extra or {})}
            self._events.write(iteration, {f"validation/{k}": v for k, v in scalars.items()})
        self._console.validation(iteration, consumed_tokens, loss)

    def event(self, iteration: int, name: str, message: str) -> None:
        """Report something that happened at `iteration`, e.g. "checkpoint"; prints `message`."""
        if self._console is None:
            return
        self._write("event", {"iteration": iteration, "name": name, "message": message})
        self._console.line(message)

    def close(self) -> None:
        """Close the files and take the progress bar off the terminal."""
        if self._console is not None:
            self._console.close()
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        self._console = self._events = self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(orjson.dumps({"kind": kind} | record, option=orjson.OPT_APPEND_NEWLINE))


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


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; half a line at its end, left by a kill, is passed over.

    Raises:
        UserError: there is no such file, or a line before the last is not a metrics record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is it the folder of a training run?") from None
    return list(_parse(path, lines))


def _parse(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            if number == len(lines):
                return
            record = None
        whole = isinstance(record, dict) and "kind" in record
        if not whole or type(record.get("iteration")) is not int:
            start = line[:80].decode(errors="replace")
            raise UserError(
                f"{path}:{number} is not a metrics record: {start!r}; "
                "mend the line or move the file away"
            )
        yield record


def truncate_after(path: Path, iteration: int) -> None:
    """Move what is newer than `iteration` from a metrics file to the end of REWOUND_FILE.

    The file is replaced as a whole. What an earlier start has reported is never lost: it may have
    been another run's, whose checkpoints are gone.

    Raises:
        UserError: a line before the last is not a metrics record.
    """
    if not path.exists():
        return
    records = read_records(path)
    data = _lines(record for record in records if record["iteration"] <= iteration)
    if data == path.read_bytes():
        return
    rewound = _lines(record for record in records if record["iteration"] > iteration)
    with path.with_name(REWOUND_FILE).open("ab", buffering=0) as file:
        file.write(rewound)
        os.fsync(file.fileno())
    write_atomic(path, data)


def _lines(records: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)


def rewound_steps(run_dir: Path, iteration: int) -> tuple[int, float, float | None]:
    """What the metrics hold beyond `iteration`, at which a run goes on: steps to be done again.

    Returns:
        How many, the seconds they took, and when the last metrics were written (seconds of the
        clock; None: there are none).
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return 0, 0.0, None
    again = [r for r in read_records(path) if r["kind"] == "train" and r["iteration"] > iteration]
    last = max((record["iteration"] for record in again), default=iteration)
    with naming(path):
        seconds = sum(record["step_ms"] for record in again) / 1000
    return last - iteration, seconds, path.stat().st_mtime


def peak_memory_gib(device: "torch.device") -> float:
    """The most memory used so far: allocated on the GPU, or resident of this process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB here
