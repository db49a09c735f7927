"""Where the time of a run went: waiting, starting, training, steps done twice, checkpoints.

From the run's own files: `jobs.jsonl` (submissions), `attempts.jsonl` (starts and ends) and the
last sign of life of its metrics. Each moment from the first submission on belongs to one cause.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import UserError
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.attempts import (
    ATTEMPTS_FILE,
    of_this_run,
    read_attempts,
    records_of,
)
from megatron_hybrid.training.metrics import METRICS_FILE, read_records
from megatron_hybrid.training.verdict import INTERRUPTIONS

JOBS_FILE = "jobs.jsonl"
# In the order of a legend: what counts, then what is lost.
CAUSES = {
    "training": "steps that count",
    "checkpoint": "training stood still for a checkpoint",
    "rewound": "steps that were done again after a loss",
    "start-up": "from the start of the ranks to the first step",
    "down": "dead, and not noticed yet",
    "queue": "waiting for nodes",
}


@dataclass(frozen=True)
class Span:
    """Seconds of the clock from `start` to `end`, and what they went for (see `CAUSES`)."""

    start: float
    end: float
    cause: str


@dataclass(frozen=True)
class RunTime:
    """The time of a run.

    Attributes:
        spans: in order, without gaps.
        attempts, failures: starts, and those of them that ended by an error.
        ended: why the run ended, None if it has not: it runs, or waits to go on.
        last_sign: of life, in seconds of the clock.
    """

    spans: tuple[Span, ...]
    attempts: int
    failures: int
    ended: str | None
    last_sign: float | None

    def seconds(self, cause: str) -> float:
        """All time that went for a cause."""
        return sum(span.end - span.start for span in self.spans if span.cause == cause)

    @property
    def total(self) -> float:
        """From the first submission to the end, or now."""
        return sum(span.end - span.start for span in self.spans)

    @property
    def goodput(self) -> float:
        """The share of the time in which steps that count were done."""
        return self.seconds("training") / self.total if self.total else 0.0


def run_time(run_dir: Path, now: float) -> RunTime:
    """Account for a run's time up to `now` (seconds of the clock).

    Raises:
        UserError: its metrics, or what is known of its starts, are damaged.
    """
    events = read_attempts(run_dir)
    for event in events:
        _refuse_other_numbers(run_dir / ATTEMPTS_FILE, event)
    metrics = run_dir / METRICS_FILE
    last_sign = metrics.stat().st_mtime if metrics.exists() else None
    attempts = _attempts(events)
    ended = None
    if events and events[-1]["event"] == "end":
        ended = str(events[-1].get("reason"))
    if events and events[-1]["event"] == "stop":
        ended = f"stopped: {events[-1].get('text')}"
    submitted = _first_submission(run_dir)
    spans: list[Span] = []
    at = submitted
    for number, attempt in enumerate(attempts):
        launched = attempt[0].get("launched", attempt[0]["time"])
        if at is not None:
            spans.append(Span(at, launched, "queue"))
        found = list(_spans(attempt, attempts[number + 1 :], now, last_sign))
        spans += found
        at = found[-1].end
    waits = ended is None or ended in INTERRUPTIONS
    if at is not None and (not attempts or (waits and attempts[-1][-1]["event"] in _OVER)):
        spans.append(Span(at, now, "queue"))
    spans = [span for span in spans if span.end > span.start]
    failures = sum(event["event"] == "failure" for event in events)
    return RunTime(tuple(spans), len(attempts), failures, None if waits else ended, last_sign)


_OVER = ("end", "failure")


# By event, what its time is accounted by.
_NEEDED = dict.fromkeys(("start", "end", "failure"), ("time",)) | {
    "training": ("time", "iteration"),
    "checkpoint": ("time", "iteration", "stall_s"),
}
_NUMBERS = ("time", "launched", "stall_s", "active_until")


def _refuse_other_numbers(path: Path, record: dict[str, Any], *needed: str) -> None:
    needed += _NEEDED.get(str(record.get("event")), ())
    for name in dict.fromkeys((*_NUMBERS, *needed)):
        value = record.get(name)
        if name == "active_until" and value is None:
            continue  # nothing is known
        if (name in needed or name in record) and type(value) not in (int, float):
            raise UserError(
                f"{path} is damaged: {name}={value!r} must be a number in {record!s:.100}; mend "
                "the line or move the file away"
            )


def _attempts(events: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Events by attempt; each begins with its "start"."""
    found: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            found.append([])
        if found:
            found[-1].append(event)
    return found


def _spans(
    attempt: list[dict[str, Any]],
    later: Sequence[list[dict[str, Any]]],
    now: float,
    last_sign: float | None,
) -> Iterator[Span]:
    """What the time of one attempt went for."""
    launched = attempt[0].get("launched", attempt[0]["time"])
    over = next((event["time"] for event in attempt if event["event"] in _OVER), None)
    begun = next((event for event in attempt if event["event"] == "training"), None)
    resumed = [event for each in later for event in each if event["event"] == "training"]
    # Of an attempt that was cut off, the next one that trains knows the last sign of life.
    seen = resumed[0].get("active_until") if resumed else last_sign if later else now
    if begun is None:
        yield Span(launched, max(launched, over or seen or launched), "start-up")
        return
    at = begun["time"]
    end = max(at, over or seen or at)
    yield Span(launched, at, "start-up")
    alive, ways = end, [event["event"] for event in attempt]
    if "end" not in ways and (later or "failure" in ways):
        known = seen if later else last_sign
        alive = min(end, max(at, known or end))
    # Steps beyond that at which a later attempt began are done again.
    again = min((event["iteration"] for event in resumed), default=math.inf)
    kept = [e["time"] for e in attempt if e["event"] == "checkpoint" and e["iteration"] <= again]
    ended = [e.get("iteration", math.inf) for e in attempt if e["event"] == "end"]
    lost = bool(resumed) and min(ended, default=math.inf) > again
    rewound = min(alive, max([at, *kept])) if lost else alive
    for event in attempt:
        if event["event"] == "checkpoint":
            start = min(rewound, max(at, event["time"] - event["stall_s"]))
            stop = min(rewound, max(start, event["time"]))
            yield Span(at, start, "training")
            yield Span(start, stop, "checkpoint")
            at = max(at, stop)
    yield Span(at, max(at, rewound), "training")
    yield Span(max(at, rewound), alive, "rewound")
    yield Span(alive, end, "down")


def _first_submission(run_dir: Path) -> float | None:
    jobs = read_jobs(run_dir)
    return float(jobs[0]["time"]) if jobs else None


def read_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The submissions of a run: job id, time and folder of each.

    Raises:
        UserError: the file that has them is damaged.
    """
    path = run_dir / JOBS_FILE
    found = []
    for job in of_this_run(path, records_of(path)):
        with naming(path):
            _refuse_other_numbers(path, job, "time")
            found.append(job | {"job": str(job["job"])})
    return found


def last_steps(run_dir: Path, count: int = 20) -> list[dict[str, Any]]:
    """The records of the last training steps; empty where there are none.

    Raises:
        UserError: the metrics are damaged.
    """
    path = run_dir / METRICS_FILE
    records = read_records(path) if path.exists() else []
    return [record for record in records if record["kind"] == "train"][-count:]
