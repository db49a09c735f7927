"""The smoke test: one rank, then every layout from its checkpoint, then back to one rank."""

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_hybrid.config import TRACKER_FILE
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.human import say
from megatron_hybrid.smoke.facts import Facts, find_facts
from megatron_hybrid.smoke.layouts import (
    FIRST_SAVED,
    ONE_RANK,
    SECOND_SAVED,
    STEPS,
    Layout,
    choose_layouts,
    pretrain_words,
)
from megatron_hybrid.smoke.run import LAUNCHED, Ranks, RunFailedError, read_losses, train

# Largest relative difference of a loss. On GPUs the layouts add bf16 numbers, of 8 bits, in other
# orders, and the steps of the optimizer carry the differences on.
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
DEFAULT_CPU_RANKS = 2
WAIT_S = 900.0


@dataclass(frozen=True)
class Result:
    """A line of the table. `problem` is empty where all is well."""

    name: str
    losses: list[float]
    difference: float | None
    seconds: float
    problem: str = ""


def find_ranks(nproc: int | None, gpus: int) -> Ranks:
    """Who takes part: a launcher's ranks, else `nproc`, else a rank a GPU, or two on the CPU.

    Raises:
        UserError: a launcher's variables are incomplete, or `nproc` cannot be had.
    """
    if "WORLD_SIZE" in os.environ:
        if missing := [name for name in (*LAUNCHED, "MASTER_ADDR") if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE is set, but not {', '.join(missing)}; allowed: all or none"
            )
        if nproc is not None:
            raise UserError(
                f"--nproc={nproc}: a launcher has started this rank already "
                f"(WORLD_SIZE={os.environ['WORLD_SIZE']}); allowed: no --nproc"
            )
        return Ranks(int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    if nproc is not None and gpus and nproc > gpus:
        raise UserError(f"--nproc={nproc}: a rank needs a GPU of its own; allowed: 1 to {gpus}")
    return Ranks(nproc or gpus or DEFAULT_CPU_RANKS)


@contextmanager
def work_folder(keep: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Where the runs are; removed at the end unless it is to be kept.

    Raises:
        UserError: it holds something already, or a launcher's nodes would not share it.
    """
    if ranks.rank is None and keep is None:
        with tempfile.TemporaryDirectory(prefix="megatron-hybrid-smoke-") as name:
            yield Path(name)
        return
    if keep is None and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise UserError("on several nodes, --keep must name a folder that all of them share")
    own = f"megatron-hybrid-smoke-{os.environ.get('MASTER_PORT')}"
    folder = keep.absolute() if keep is not None else Path(tempfile.gettempdir()) / own
    if ranks.reports:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} must be an empty folder, or not exist")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if keep is None and ranks.reports:
            shutil.rmtree(folder, ignore_errors=True)


def smoke_test(nproc: int | None, names: Sequence[str] | None, keep: Path | None) -> bool:
    """Run everything and print it; whether all is well.

    Args:
        nproc: as `find_ranks`.
        names: of layouts; None for all that fit.
        keep: folder in which the runs stay.

    Raises:
        UserError: a choice cannot be had here, or this installation cannot train at all.
    """
    facts = find_facts()
    ranks = find_ranks(nproc, facts.gpus)
    layouts = choose_layouts(ranks.world_size, names)
    console = Console(quiet=not ranks.reports)
    console.print(facts.line, soft_wrap=True, highlight=False)
    with work_folder(keep, ranks) as folder:
        test = _Test(folder, ranks, facts, console)
        results = test.run(layouts)
        if ranks.reports:
            test.print_table(results)
    return not any(each.problem for each in results)


class _Test:
    def __init__(self, folder: Path, ranks: Ranks, facts: Facts, console: Console) -> None:
        self._folder = folder
        self._ranks = ranks
        self._has_gpu = facts.gpus > 0
        self._console = console
        self._tolerance = TOLERANCES["bf16" if self._has_gpu else "fp32"]
        self._runs = 0
        self._reference: dict[int, float] = {}

    def run(self, layouts: Sequence[Layout]) -> list[Result]:
        """One result a run; only the first where one rank alone fails."""
        start = self._folder / "start"
        results = [self._one_rank()]
        if results[0].problem:
            return results
        self._hand_over(self._folder / "one_rank", FIRST_SAVED, start)
        for layout in layouts:
            results.append(self._compare(self._label(layout), layout, start, layout.name))
        # Back to one rank, from what the first sound layout has saved; without any, from its own.
        back, load = f"{ONE_RANK}, resumed", start
        for layout, result in zip(layouts, results[1:], strict=True):
            if not result.problem:
                back, load = f"{ONE_RANK}, from {result.name}", self._folder / "back"
                self._hand_over(self._folder / layout.name, SECOND_SAVED, load)
                break
        results.append(self._compare(back, Layout("resumed"), load, "resumed", alone=True))
        return results

    def print_table(self, results: Sequence[Result]) -> None:
        """The losses are those of the last steps, which all runs have in common."""
        table = Table(box=None, padding=(0, 1, 0, 0))
        for title in ("layout", "losses", "worst\nrelative\ndifference", "seconds", "ok"):
            table.add_column(title, no_wrap=True)
        for each in results:
            losses = " ".join(f"{loss:.4f}" for loss in each.losses[FIRST_SAVED - STEPS :])
            difference = "" if each.difference is None else f"{each.difference:.1e}"
            ok = "[red]no[/]" if each.problem else "[green]yes[/]"
            table.add_row(each.name, losses or "-", difference, f"{each.seconds:.1f}", ok)
        self._console.print(table)
        failed = [each for each in results if each.problem]
        if not failed:
            self._console.print(f"all agree to {self._tolerance:g}, in {self._device()}")
            return
        for each in failed:
            say(f"error: {each.name}: {each.problem}", sys.stderr)

    def _device(self) -> str:
        return "bf16 on GPUs" if self._has_gpu else "fp32 on the CPU"

    def _label(self, layout: Layout) -> str:
        """Its name, and how many times the rest of the ranks repeat it."""
        replicas = self._ranks.world_size // layout.ranks
        if layout.name == "DP":
            return f"DP{replicas}"
        return layout.name if replicas == 1 else f"{layout.name} x DP{replicas}"

    def _one_rank(self) -> Result:
        folder = self._folder / "one_rank"
        result = self._train(ONE_RANK, Layout(ONE_RANK), folder, [], alone=True)
        if not result.problem and self._ranks.reports:
            self._reference = dict(zip(range(1, STEPS + 1), result.losses, strict=True))
        return result

    def _compare(
        self, name: str, layout: Layout, load: Path, folder: str, *, alone: bool = False
    ) -> Result:
        """Go on from a checkpoint, and hold the losses of its steps against one rank's."""
        words = [f"checkpoint.load={load}"]
        result = self._train(name, layout, self._folder / folder, words, alone=alone)
        if result.problem or not self._ranks.reports:
            return result
        expected = list(self._reference.values())[-len(result.losses) :]
        difference = max(
            abs(loss - other) / abs(other)
            for loss, other in zip(result.losses, expected, strict=True)
        )
        good = difference <= self._tolerance  # not so for NaN either
        problem = "" if good else f"losses differ from one rank's by {difference:.1e}; "
        problem += "" if good else f"allowed in {self._device()}: {self._tolerance:g}"
        return Result(name, result.losses, difference, result.seconds, problem)

    def _train(
        self, name: str, layout: Layout, folder: Path, more: list[str], *, alone: bool
    ) -> Result:
        """One training. A rank that has no part in it returns at once, without losses."""
        number, self._runs = self._runs, self._runs + 1
        if alone and not self._ranks.reports:
            return Result(name, [], None, 0.0)
        words = pretrain_words(folder, layout, self._ranks.world_size, self._has_gpu)
        with self._console.status(name):
            try:
                seconds = train([*words, *more], self._ranks, number, alone=alone)
            except RunFailedError as error:
                if self._ranks.rank is not None:  # the launcher ends the others
                    raise UserError(f"rank {self._ranks.rank}, {name}:\n{error}") from error
                return Result(name, [], None, 0.0, f"the training failed\n{error}")
        losses = read_losses(folder) if self._ranks.reports else {}
        values = [math.nan if loss is None else loss for loss in losses.values()]
        return Result(name, values, None, seconds)

    def _hand_over(self, run_dir: Path, step: int, to: Path) -> None:
        """Make a checkpoint that a run has saved on its way the only one of a folder."""
        tracker = to / TRACKER_FILE
        if not self._ranks.reports:
            _wait_for(tracker)
            return
        name = f"iter_{step:07d}"
        to.mkdir()
        (run_dir / "checkpoints" / name).rename(to / name)
        write_atomic(tracker, str(step))


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{path} did not appear in {WAIT_S:g} s: is its folder shared?")
        time.sleep(0.1)
