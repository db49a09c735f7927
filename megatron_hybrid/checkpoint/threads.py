"""Threads that move a checkpoint's bytes, and the bar that shows how far they are."""

import os
import threading
from collections.abc import Callable, Iterable

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

MAX_THREADS = 8


def default_threads() -> int:
    """As many as there are processors for us, up to MAX_THREADS: disks want a few at once."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))


def in_threads[Item](
    items: Iterable[Item], work: Callable[[Item, int], None], threads: int
) -> None:
    """Do `work(item, number of the thread)` on every item; threads take them in order.

    The first error ends all and is raised; Ctrl-C in the main thread ends them as well. Items in
    hand are finished.
    """
    iterator, lock, stop = iter(items), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(iterator, None)
                if item is None:
                    return
                work(item, number)
        except BaseException as error:
            errors.append(error)
            stop.set()

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        stop.set()
        for worker in workers:
            if worker.is_alive():
                worker.join()
    if errors:
        raise errors[0]


def progress_bar() -> Progress:
    """Bytes done, bytes a second and time left, on stderr where that is a terminal."""
    from rich.console import Console

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
