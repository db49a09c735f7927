"""Each start of a run, in a file of the run: what a scheduler's restarts came to.

`attempts.jsonl` has an object a line, in the order of time:

    {"event": "start", "attempt": "17.0.2", "time": ..., "run_dir": "/...", "launched": ...,
     "world_size": 8, "host": ..., "job": "17"}
    {"event": "training", ..., "iteration": 100, "rewound_steps": 3, "active_until": ...}
    {"event": "checkpoint", ..., "iteration": 200, "stall_s": 1.4}
    {"event": "unsound", ..., "iteration": 207, "found": [which rank saw what, where: findings.py]}
    {"event": "end", ..., "iteration": 200, "reason": "SIGUSR1"}
    {"event": "failure", ..., "iteration": 207, "error": ..., "exit_code": 137}
    {"event": "stop", "time": ..., "text": why it is not started again}

A "failure" or "stop" is written by whoever watched the ranks (see `verdict.py`); an attempt without
"end" and "failure" was cut off together with its watcher. `run_dir` tells a copy of a run's folder
from the run.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import dropwhile
from pathlib import Path
from typing import Any

import psutil

from launchers import slurm
from launchers.place import ATTEMPT
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.training.findings import Finding

ATTEMPTS_FILE = "attempts.jsonl"


class AttemptLog:
    """Writes what becomes of this start of a run; for rank 0.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ATTEMPTS_FILE
        self._attempt = os.environ.get(ATTEMPT) or f"alone-{time.strftime('%Y%m%d-%H%M%S')}"

    def start(self, world_size: int) -> None:
        """The ranks have met; this process began some time ago."""
        self.write(
            "start", world_size=world_size, host=socket.gethostname(),
            job=slurm.job_name(os.environ), launched=psutil.Process().create_time(),
        )  # fmt: skip

    def training(self, iteration: int, rewound_steps: int, active_until: float | None) -> None:
        """The first step begins.

        Args:
            iteration: steps that are done.
            rewound_steps: steps after it that an attempt before had done.
            active_until: when that attempt did its last step, in seconds of the clock.
        """
        self.write(
            "training", iteration=iteration, rewound_steps=rewound_steps, active_until=active_until
        )

    def checkpoint(self, iteration: int, stall_s: float) -> None:
        """Training stood still for a checkpoint."""
        self.write("checkpoint", iteration=iteration, stall_s=round(stall_s, 3))

    def unsound(self, iteration: int, findings: Sequence[Finding]) -> None:
        """A step was not finite, and the run ends for it."""
        self.write("unsound", iteration=iteration, found=[asdict(each) for each in findings])

    def end(self, iteration: int, reason: str) -> None:
        """The run is at its end, or was asked to end."""
        self.write("end", iteration=iteration, reason=reason)

    def write(self, event: str, **values: Any) -> None:
        """Append one event; it is on the disk when this returns."""
        where = str(self._path.parent.resolve())
        told = {"event": event, "attempt": self._attempt, "time": time.time(), "run_dir": where}
        append(self._path, told | values)


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a line; what a killed writer left of one before is closed off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        torn = b""
        if end:
            file.seek(end - 1)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + json.dumps(record).encode() + b"\n")
        os.fsync(file.fileno())


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run, not of another one whose folder it is a copy of; lines that a killed
    writer left unfinished are passed over.
    """
    path = run_dir / ATTEMPTS_FILE
    events = [each for each in records_of(path) if isinstance(each, dict) and "event" in each]
    own = of_this_run(path, events)
    if len(own) == len(events):
        return own
    # Who watched the other run's ranks may have written of them after its last record.
    return list(dropwhile(lambda event: event["event"] != "start", own))


def of_this_run(path: Path, records: Sequence[Any]) -> list[Any]:
    """Records of a run's file after those that another run has still, from which it was copied.

    A run whose folder was moved keeps them.

    Args:
        path: the file.
        records: its lines, in their order, with the `run_dir` in which each was written.
    """
    theirs: dict[str, list[Any]] = {}
    copied = 0
    for number, record in enumerate(records, start=1):
        folder = record.get("run_dir") if isinstance(record, dict) else None
        if not isinstance(folder, str):
            continue
        if folder not in theirs:
            theirs[folder] = _of_another(Path(folder) / path.name, path)
        if record in theirs[folder]:
            copied = number
    return list(records[copied:])


def _of_another(there: Path, path: Path) -> list[Any]:
    """The records of another file; none of the same, or where it is not to be had."""
    try:
        return [] if there.samefile(path) else records_of(there)
    except (OSError, ValueError):  # it is gone, of another machine, or no path
        return []


def records_of(path: Path) -> list[Any]:
    """A file's lines, but for those that a killed writer left unfinished; of no file, none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(parse_json(line))
        except ValueError:
            continue
    return found
