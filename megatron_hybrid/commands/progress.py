"""The progress bar of a command that moves bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, as the function that is told bytes done since the last call, and bytes in all."""
    from megatron_hybrid.checkpoint.threads import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, advance=done, total=total)

        yield advance
