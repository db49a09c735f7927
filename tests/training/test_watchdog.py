"""Where ranks are, and what that says of the one that the others wait for."""

import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.config import load_config
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.distributed import (
    COLLECTIVE_TIMEOUT_MINUTES,
    collective_timeout_minutes,
)
from megatron_hybrid.training.whereabouts import Report, explain, locate
from tests.config import GOOD


def linger(arrived: threading.Event, event: threading.Event) -> None:
    """A rank that is busy elsewhere."""
    arrived.set()
    event.wait(timeout=600)


def places(kind: str, collective: str) -> list[Report]:
    """On a rank of two: rank 0 waits in a collective for rank 1; where both are, once they are.

    If rank 0 is never seen in `collective`, the time limit of the ranks says where it is instead.
    """
    value, arrived, event = torch.ones(4), threading.Event(), threading.Event()
    rank = dist.get_rank()

    def work() -> None:
        if rank:
            linger(arrived, event)
        if kind == "all_reduce":
            dist.all_reduce(value)
        elif kind == "handle":
            handle = dist.all_reduce(value, async_op=True)
            handle.wait()
        else:
            dist.all_gather_into_tensor(torch.empty(8), value)

    thread = threading.Thread(target=work)
    thread.start()
    if rank:
        arrived.wait()
    while True:
        found = locate(sys._current_frames()[thread.ident or 0], rank, 7)
        if rank or found.collective == collective:
            break
        time.sleep(0.01)
    reports: list[Any] = [None, None]
    store = dist.distributed_c10d._get_default_store()
    store.set(f"seen{rank}", "yes")
    store.wait(["seen0", "seen1"])
    event.set()
    thread.join()
    dist.all_gather_object(reports, found)
    return reports


@pytest.mark.parametrize(
    ("kind", "collective", "ranks"),
    [("all_reduce", "all_reduce", (0, 1)), ("all_gather", "all_gather_into_tensor", (0, 1)),
     ("handle", "the end of an asynchronous collective", ())],
)  # fmt: skip
def test_the_rank_that_did_not_arrive(kind: str, collective: str, ranks: tuple[int, ...]) -> None:
    """The collective, its ranks and the line that called it; of the other, where it is instead."""
    waiting, other = run_distributed(places, 2, kind, collective)[0]
    assert (waiting.collective, waiting.ranks) == (collective, ranks)
    assert "tests/training/test_watchdog.py" in waiting.place and waiting.place.endswith(" work")
    assert other.collective is None
    text = explain({0: waiting, 1: other}, 2, 60, Path("logs"))
    assert f"rank 0 waits in {collective}" in text
    assert "rank 1 on " in text and "did not arrive: it is in" in text


def test_silent_ranks_are_named() -> None:
    """Those that have written nothing; ranks in one collective take one line."""
    reports = {
        rank: Report(rank, "a", 9, "all_reduce", (0, 1, 2, 3), "core/x.py:1 f") for rank in (0, 1)
    }
    lines = explain(reports, 4, 60, Path("logs")).splitlines()
    assert lines[:3] == [
        "hang: nothing has moved for 60 s, after step 9",
        "rank 2-3 did not arrive, and does not answer: stopped, swapping, or its node is gone",
        "rank 0-1 waits in all_reduce of ranks 0-3, called by core/x.py:1 f",
    ]


def test_ranks_wait_longer_than_the_watchdog() -> None:
    """It says where they are, so it must come first; and without it nobody gives up."""

    def minutes(hang_s: str) -> int:
        line = [*GOOD, f"training.hang_timeout_s={hang_s}"]
        return collective_timeout_minutes(load_config(line, which=()))

    assert minutes("1200") == minutes("1") == COLLECTIVE_TIMEOUT_MINUTES
    for hang_s in (1799, 1801, 7200, 10**9):
        assert 60 * minutes(str(hang_s)) > hang_s + 60
    assert minutes("null") > 365 * 24 * 60
    assert timedelta(minutes=minutes("1e9")).total_seconds() * 1e9 < 2**62  # of nanoseconds
