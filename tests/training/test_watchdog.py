"""Where ranks are, and what that says of the one that the others wait for."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.whereabouts import Report, explain, locate


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
