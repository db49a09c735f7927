"""`run_on_gpus`: run_distributed, with ranks that have the stand-in."""

import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver, spawn
from typing import Any
from unittest.mock import patch

from megatron_hybrid.testing import run_distributed

# Python has one server a process, and that of run_distributed, like all that are forks of
# `tests.warm`, has imported the engine without Transformer Engine.
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["tests.gpu_on_cpu.preload"])


def run_on_gpus(fn: Callable[..., Any], world_size: int, *args: Any, **named: Any) -> list[Any]:
    """As `run_distributed`, on pretended GPUs; they are Hopper's unless `fn` says otherwise."""
    __tracebackhide__ = True
    with (
        patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process),
        patch.object(spawn, "get_executable", lambda: os.fsencode(sys.executable)),
    ):
        return run_distributed(partial(_with_stand_in, fn), world_size, *args, **named)


def _with_stand_in(fn: Callable[..., Any], *args: Any, **named: Any) -> Any:
    from megatron_hybrid.platform import initialize

    assert initialize().has_cuda, "the fork server could not import tests.gpu_on_cpu.preload"
    return fn(*args, **named)
