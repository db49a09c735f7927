"""A side of a comparison in a process of its own, which takes its turns through a pipe."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from megatron_hybrid.platform.threads import spin_before_sleeping

BUILD_TIMEOUT_S = 300


@contextmanager
def side_process(side: str, serve: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process that has built `side`, and the pipe that asks it for turns.

    Args:
        side: "ours" waits as the command line does.
        serve: called there with side, `args` and the other end of the pipe: it sends once when all
            is built, answers each message, and ends at None.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(side, *args, there))
    environment = dict(os.environ)
    if side == "ours":
        spin_before_sleeping()  # the peer's threads spin 3 ms as they are
    process.start()
    os.environ.clear()
    os.environ.update(environment)
    there.close()
    try:
        if not here.poll(BUILD_TIMEOUT_S):
            raise TimeoutError(f"{side} was not built within {BUILD_TIMEOUT_S} s")
        here.recv()
        yield here
        here.send(None)
    except EOFError:
        raise SystemExit(f"the process of {side} has ended; its error stands above") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
