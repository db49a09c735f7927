"""`run_distributed`: a rank's side, from the fork to the report."""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

ALL_DONE = b"all ranks have reported"


@dataclass(frozen=True)
class Report:
    """What a rank sends back.

    Attributes:
        failed: whether the function raised.
        time_s: when, on the machine's monotonic clock: the first to fail is the one to blame.
        payload: the result, or the exception if it can be sent; else empty.
        summary: the exception in one line.
        traceback: the exception with its traceback.
    """

    failed: bool
    time_s: float
    payload: bytes
    summary: str = ""
    traceback: str = ""


def main(
    pipe: Connection,
    rank: int,
    world_size: int,
    store: str,
    output: str,
    environment: dict[str, str],
) -> None:
    """Do the work that comes through `pipe` as rank `rank`, report, and wait for the others.

    Args:
        pipe: brings the deadline (on the machine's monotonic clock) and the work; takes the report.
        store: file through which the ranks find each other.
        output: file for what this rank and its children print.
        environment: the caller's, to be this rank's.
    """
    os.setpgid(0, 0)
    _redirect_output(output)
    # Written by C code that needs no Python: it works in a deadlock and after a crash.
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # that of TMPDIR as it was, where an import has asked for it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    deadline, work = pipe.recv()
    faulthandler.dump_traceback_later(max(0.01, deadline - time.monotonic()))
    all_done = threading.Event()
    threading.Thread(target=_watch_parent, args=(pipe, all_done), daemon=True).start()
    try:
        report = Report(False, 0.0, _work(work, rank, world_size, store))
    except BaseException as error:
        report = _failure(error)
    sys.stdout.flush()
    pipe.send_bytes(pickle.dumps(report))
    # Leaving before the others have finished would break connections that they still use.
    all_done.wait()
    faulthandler.cancel_dump_traceback_later()


def _work(work: bytes, rank: int, world_size: int, store: str) -> bytes:
    import torch

    from megatron_hybrid.platform import initialize

    torch.set_num_threads(1)
    backend = initialize().distributed_backend
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    fn, args, kwargs = load(work)
    return dump(fn(*args, **kwargs))


def _failure(error: BaseException) -> Report:
    try:
        payload = dump(error)
        load(payload)  # an exception may pickle and yet not unpickle
    except Exception:
        payload = b""
    return Report(
        failed=True,
        time_s=time.monotonic(),
        payload=payload,
        summary="".join(traceback.format_exception_only(error)).strip(),
        traceback="".join(traceback.format_exception(error)),
    )


def dump(value: Any) -> bytes:
    """`value` pickled, tensors by value: no rank shares memory with another or with the parent."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load(data: bytes) -> Any:
    """Undo `dump`. The data come from our own processes, functions and exceptions among them."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _redirect_output(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _watch_parent(pipe: Connection, all_done: threading.Event) -> None:
    """Set `all_done` when the parent says so; if the parent is gone, end this rank and its own."""
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
    all_done.set()
