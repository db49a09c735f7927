"""How far work on large files is: a bar with MB/s and the time left, or lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

# Called with what is going on, and how many bytes of it are done and in all.
OnProgress = Callable[[str, int, int], None]

LOG_EVERY_S = 10.0


def show_progress(
    stage: str, log_every_s: float = LOG_EVERY_S
) -> AbstractContextManager[OnProgress]:
    """Show on stderr what the function that it gives is called with.

    Args:
        stage: what is going on first.
        log_every_s: seconds between two lines, where stderr is no terminal.
    """
    console = Console(stderr=True)
    return _bar(console, stage) if console.is_terminal else _log(console, log_every_s)


@contextmanager
def _bar(console: Console, first_stage: str) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = {first_stage: progress.add_task(first_stage, total=None)}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage)
            progress.update(bars[stage], completed=done, total=total)

        yield draw


@contextmanager
def _log(console: Console, every_s: float) -> Iterator[OnProgress]:
    """Lines instead of a bar, where stderr is no terminal."""
    stage_now, start, last = "", 0.0, 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal stage_now, start, last
        now = time.monotonic()
        if stage != stage_now:
            stage_now, start, last = stage, now, now
        if now - last < every_s or not done:
            return
        last = now
        rate = done / (now - start)
        console.print(
            f"{stage}: {done / total:4.0%} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{(total - done) / rate:.0f} s left",
            highlight=False,
        )

    yield report
