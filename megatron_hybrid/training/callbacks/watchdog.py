"""End a run that gets nowhere, and say where every rank is.

A rank that dies is noticed by all; one that hangs is not: the others wait in a collective, for as
long as its timeout is, and say nothing. So each rank has a thread that looks whether its trainer
still gets anywhere. If not, it writes the stacks of its threads and the collective that it waits
in to the run's logs. Which ranks are in which collective, and which have written nothing, tells
who did not arrive.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from launchers.errors import record_error
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.human import say
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.training.callbacks.base import Callback, Evaluation, Step
from megatron_hybrid.training.whereabouts import Report, explain, locate

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer

SETTLE_S = 3.0  # for the reports of ranks whose clocks and steps differ a little
EXIT_CODE = 1


class Watchdog(Callback):
    """Ends the run when no step, evaluation or checkpoint is done for `timeout_s`.

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

    def on_run_start(self, run: "Trainer") -> None:
        self._last = time.monotonic()
        self._own_report.unlink(missing_ok=True)  # of a start before, where they share a name
        if self._timeout_s is not None:
            self._thread.start()

    def after_step(self, run: "Trainer", step: Step) -> None:
        self._beat(run)

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        self._beat(run)

    def on_progress(self, run: "Trainer") -> None:
        self._beat(run)

    def after_save(self, run: "Trainer", seconds: float) -> None:
        self._beat(run)

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        self._ended.set()

    def _beat(self, run: "Trainer") -> None:
        """The trainer got somewhere; costs nothing."""
        self._iteration = run.progress.iteration
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
                say(text, sys.stderr)
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
