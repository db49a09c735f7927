"""Find the rank that keeps the others waiting, say where every rank is, and end the run.

A rank that dies is noticed by all; one that hangs is not: the others wait in a collective, for as
long as its timeout is, and say nothing. So each rank has a thread that looks whether its trainer
still gets anywhere. If not, it writes the stacks of its threads and the collective that it waits
in to the run's logs. Which ranks are in which collective, and which have written nothing, tells
who did not arrive.
"""

import contextlib
import faulthandler
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from launchers.errors import record_error
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.json_text import parse_json

SETTLE_S = 3.0  # for the reports of ranks whose clocks and steps differ a little
# Of frames between a collective and its caller.
_BETWEEN = ("c10d_logger.py", "contextlib.py", "typing_extensions.py")
EXIT_CODE = 1


@dataclass(frozen=True)
class Report:
    """Where a rank is.

    Attributes:
        collective: that it waits in, such as "all_reduce"; None: it is elsewhere.
        ranks: that take part in it; empty: unknown.
        place: file, line and function of the caller, or of what runs.
    """

    rank: int
    host: str
    iteration: int
    collective: str | None
    ranks: tuple[int, ...]
    place: str


class Watchdog:
    """While active, ends the run when `beat` is not called for `timeout_s`.

    Args:
        folder: for reports and stacks, on a disk that all ranks see.
        timeout_s: None: nothing is watched.
    """

    def __init__(self, folder: Path, timeout_s: float | None) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self._iteration = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._trainer = threading.get_ident()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._own_report = folder / _report_file(f"{self._rank:05d}")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._last = time.monotonic()
        self._own_report.unlink(missing_ok=True)  # of a start before, where they share a name
        if self._timeout_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def beat(self, iteration: int) -> None:
        """The trainer got somewhere; costs nothing."""
        self._iteration = iteration
        self._last = time.monotonic()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        while not self._ended.wait(min(1.0, self._timeout_s / 4)):
            if time.monotonic() - self._last > self._timeout_s:
                self._end_the_run()

    def _end_the_run(self) -> None:
        """Report; the first rank that has also says what all the reports come to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"stacks_rank_{self._rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        report = locate(sys._current_frames()[self._trainer], self._rank, self._iteration)
        path = self._own_report
        write_atomic(path, json.dumps(asdict(report)))
        time.sleep(SETTLE_S)
        if self._ended.is_set():
            return
        # Thousands of ranks look into one folder: each once, and only the first reads the reports.
        if path == min(self._folder.glob(_report_file("*"))):
            text = explain(self._reports(), self._world_size, self._timeout_s or 0, self._folder)
            if not record_error(text):
                print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(SETTLE_S)  # the error of the one that explains must be the first
        os._exit(EXIT_CODE)

    def _reports(self) -> dict[int, Report]:
        found: dict[int, Report] = {}
        for path in self._folder.glob(_report_file("*")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                values = parse_json(path.read_text(encoding="utf-8"))
                report = Report(**values | {"ranks": tuple(values["ranks"])})
                found[report.rank] = report
        return found


def _report_file(rank: str) -> str:
    return f"hang_rank_{rank}.json"


def locate(frame: FrameType | None, rank: int, iteration: int) -> Report:
    """Where a thread is: the collective nearest to its innermost frame, and who called that."""
    collective: str | None = None
    ranks: tuple[int, ...] = ()
    caller = frame
    inner = frame
    while inner is not None:
        name = Path(inner.f_code.co_filename).name
        if name == "distributed_c10d.py":
            # Such as all_reduce, _all_gather_base, and _coalescing_manager around several.
            collective, ranks = inner.f_code.co_name.strip("_"), _ranks(inner.f_locals.get("group"))
            caller = inner.f_back
        elif collective is not None and name not in _BETWEEN:
            caller = inner
            break
        elif collective is None and _waits(inner):
            collective, caller = "the end of an asynchronous collective", inner
            break
        inner = inner.f_back
    return Report(rank, socket.gethostname(), iteration, collective, ranks, _place(caller))


def _ranks(group: Any) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    except (ValueError, KeyError, RuntimeError):
        return ()


def _waits(frame: FrameType) -> bool:
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return ".wait()" in line and "torch" not in Path(frame.f_code.co_filename).parts


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "nowhere"
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"


def explain(reports: Mapping[int, Report], world_size: int, timeout_s: float, folder: Path) -> str:
    """Which ranks did not arrive where the others wait, in a few lines."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    elsewhere = [report for report in reports.values() if report.collective is None]
    lines = [f"hang: nothing has moved for {timeout_s:g} s, "
             f"after step {max(report.iteration for report in reports.values())}"]  # fmt: skip
    if silent:
        lines.append(
            f"rank {_listed(silent)} did not arrive, and does not answer: stopped, swapping, or "
            "its node is gone"
        )
    for report in elsewhere:
        lines.append(f"rank {report.rank} on {report.host} did not arrive: it is in {report.place}")
    waiting: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for report in reports.values():
        if report.collective is not None:
            key = (report.collective, report.ranks, report.place)
            waiting.setdefault(key, []).append(report.rank)
    for (collective, ranks, place), who in sorted(waiting.items(), key=lambda item: item[1]):
        of = f" of ranks {_listed(list(ranks))}" if ranks else ""
        lines.append(f"rank {_listed(who)} waits in {collective}{of}, called by {place}")
    lines.append(f"stacks of all threads: {folder}/stacks_rank_*.txt")
    return "\n".join(lines)


def _listed(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> 0-2, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
