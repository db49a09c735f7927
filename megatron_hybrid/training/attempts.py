"""Each start of a run, in a file of the run: what a scheduler's restarts came to.

`attempts.jsonl` has an object a line, in the order of time:

    {"event": "start", "attempt": "17.0.2", "time": ..., "launched": ..., "world_size": 8,
     "host": ..., "job": "17"}
    {"event": "training", ..., "iteration": 100, "rewound_steps": 3, "rewound_s": 4.2,
     "active_until": ...}
    {"event": "checkpoint", ..., "iteration": 200, "stall_s": 1.4}
    {"event": "unsound", ..., "iteration": 207, "found": [which rank saw what, where: findings.py]}
    {"event": "end", ..., "iteration": 200, "reason": "SIGUSR1"}
    {"event": "failure", ..., "iteration": 207, "error": ..., "exit_code": 137}
    {"event": "stop", "time": ..., "text": why it is not started again}

A "failure" or "stop" is written by whoever watched the ranks (see `verdict.py`); an attempt without
"end" and "failure" was cut off together with its watcher.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
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

    def training(
        self, iteration: int, rewound_steps: int, rewound_s: float, active_until: float | None
    ) -> None:
        """The first step begins.

        Args:
            iteration: steps that are done.
            rewound_steps: steps after it that an attempt before had done; `rewound_s` they took.
            active_until: when that attempt wrote its last metrics, in seconds of the clock.
        """
        self.write(
            "training", iteration=iteration, rewound_steps=rewound_steps,
            rewound_s=round(rewound_s, 3), active_until=active_until,
        )  # fmt: skip

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
        append(self._path, {"event": event, "attempt": self._attempt, "time": time.time()} | values)


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
    """All events of a run; lines that a killed writer left unfinished are passed over."""
    try:
        lines = (run_dir / ATTEMPTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
