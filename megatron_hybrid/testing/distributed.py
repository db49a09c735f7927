"""`run_distributed`: the parent's side. It starts the ranks, collects results, and cleans up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from megatron_hybrid.testing import rank

# After a failure the other ranks often fail for want of the first: how long to wait for a rank
# that died without a word, so that it is named and not its victims.
GRACE_S = 0.3
OUTPUT_LINES = 60


class RankError(RuntimeError):
    """A rank failed, died or did not finish.

    Attributes:
        rank: which one.
        __cause__: the rank's own exception, where it could be sent.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class _Rank:
    """One rank as the parent sees it."""

    number: int
    process: ForkServerProcess
    pipe: connection.Connection
    output: Path
    report: rank.Report | None = None

    @property
    def died(self) -> bool:
        """Whether its process ended without a report."""
        return self.report is None and self.process.exitcode is not None


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 180,
    **kwargs: Any,
) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` processes that form a gloo process group.

    In each rank `torch.distributed` is initialized, `platform.initialize()` is done, torch computes
    on one thread, and the environment and working directory are the caller's. Ranks see no CUDA
    device, so that a test does the same on every machine. They are forked from a server that has
    imported torch, megatron.core and the trainer once: a call takes a fraction of a second. What
    they print is printed here when all have succeeded.

        def total() -> float:
            value = torch.ones(())
            torch.distributed.all_reduce(value)
            return value.item()

        assert run_distributed(total, 2) == [2.0, 2.0]

    Args:
        fn: a function at the top level of an importable module.
        world_size: how many ranks.
        args, kwargs: for `fn`, picklable; each rank gets its own copy, tensors included.
        timeout_s: seconds from the start of the ranks until every one must have returned.

    Returns:
        What `fn` returned on each rank, in the order of the ranks. It must be picklable.

    Raises:
        RankError: a rank raised (its traceback is in the message and its exception is the cause),
            died by a signal, or did not finish in time (the message says where it was). The other
            ranks and all processes that ranks started are ended first.
    """
    __tracebackhide__ = True
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1")
    work = rank.dump((fn, args, kwargs))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for number in range(world_size):
                ranks.append(_start(number, world_size, Path(folder)))
            deadline = time.monotonic() + timeout_s
            for each in ranks:
                with contextlib.suppress(BrokenPipeError):  # it died: _collect sees that
                    each.pipe.send((deadline, work))
            _collect(ranks, deadline, timeout_s)
            for each in ranks:
                with contextlib.suppress(BrokenPipeError):
                    each.pipe.send_bytes(rank.ALL_DONE)
            for each in ranks:
                each.process.join(timeout=10)
        finally:
            _end(ranks)
        for each in ranks:
            sys.stdout.write(_output(each))
    return [rank.load(each.report.payload) for each in ranks if each.report is not None]


def init_model_parallel(seed: int = 1234, **sizes: int) -> None:
    """In a rank: make megatron-core's process groups and seed its random generators.

    Args:
        seed: the run's seed, from which each kind of parallel rank derives its own.
        sizes: arguments of `megatron.core.parallel_state.initialize_model_parallel`, such as
            `tensor_model_parallel_size=2`. They end with the rank.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(seed)


def warm_context() -> ForkServerContext:
    """What makes processes that have imported torch, megatron.core and the trainer."""
    context = multiprocessing.get_context("forkserver")
    preload = ["megatron_hybrid.testing.preload"]
    context.set_forkserver_preload(preload + [m for m in ("pytest",) if m in sys.modules])
    return context


def _start(number: int, world_size: int, folder: Path) -> _Rank:
    """Start one rank, which waits for its work on the other end of a pipe."""
    context = warm_context()
    here, there = context.Pipe()
    output = folder / f"rank{number}.txt"
    process = context.Process(
        target=rank.main,
        args=(there, number, world_size, str(folder / "store"), str(output)),
        kwargs={"environment": dict(os.environ)},
        name=f"rank{number}",
    )
    process.start()
    there.close()
    return _Rank(number, process, here, output)


def _collect(ranks: Sequence[_Rank], deadline: float, timeout_s: float) -> None:
    """Wait for every rank's report; raise RankError at the first sign that one will not come."""
    __tracebackhide__ = True
    while waiting := [each for each in ranks if each.report is None]:
        if not _wait(waiting, deadline):
            # Each rank writes where it is when its own clock has run out: let them finish writing.
            time.sleep(GRACE_S)
            late = waiting[0]
            numbers = ", ".join(str(each.number) for each in waiting)
            raise RankError(
                late.number,
                f"rank {numbers} of {len(ranks)} not finished after {timeout_s:g} s\n"
                + "\n".join(_output(each, tail=True) for each in waiting),
            )
        if any(each.died or (each.report and each.report.failed) for each in ranks):
            _raise_first_failure(ranks)


def _wait(waiting: Sequence[_Rank], deadline: float) -> bool:
    """Take in reports, once one is there or a rank has ended; False at the deadline."""
    events: list[Any] = [each.pipe for each in waiting]
    events += [each.process.sentinel for each in waiting]
    if not connection.wait(events, max(0.0, deadline - time.monotonic())):
        return False
    for each in waiting:
        with contextlib.suppress(EOFError, OSError):
            if each.pipe.poll():
                each.report = pickle.loads(each.pipe.recv_bytes())
    return True


def _raise_first_failure(ranks: Sequence[_Rank]) -> None:
    """Name the rank that failed first: one that died without a word, else the earliest report."""
    __tracebackhide__ = True
    grace_ends = time.monotonic() + GRACE_S
    while waiting := [each for each in ranks if each.report is None and not each.died]:
        if not _wait(waiting, grace_ends):
            break
    for each in ranks:
        if each.died:
            raise RankError(each.number, _death(each, len(ranks)))
    failed = [each for each in ranks if each.report is not None and each.report.failed]
    first = min(failed, key=lambda each: each.report.time_s if each.report else 0.0)
    assert first.report is not None
    raise RankError(
        first.number,
        f"rank {first.number} of {len(ranks)} failed: {first.report.summary}\n\n"
        f"{first.report.traceback}\n{_output(first, tail=True)}",
    ) from (rank.load(first.report.payload) if first.report.payload else None)


def _death(each: _Rank, world_size: int) -> str:
    code = each.process.exitcode
    assert code is not None
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    return f"rank {each.number} of {world_size} ended {how}\n{_output(each, tail=True)}"


def _output(each: _Rank, tail: bool = False) -> str:
    """What the rank printed, crash dumps included, each line marked with the rank's number."""
    try:
        lines = each.output.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    if tail:
        lines = lines[-OUTPUT_LINES:]
    return "".join(f"[rank {each.number}] {line}\n" for line in lines)


def _end(ranks: Sequence[_Rank]) -> None:
    """Kill what is left of every rank and of the processes that ranks started."""
    for each in ranks:
        # A rank leads a process group of its own, which outlives it as long as a child does.
        assert each.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.kill()
    for each in ranks:
        each.process.join()
        each.process.close()
        each.pipe.close()
