"""The server behind `tests.warm.python`: forks a program for each client that connects.

Linux only, as the tests that need it: namespaces (a test's Slurm has a machine in each), pidfds.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import selectors
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from launchers.forks import end_with_parent, leave_handlers, run_python
from megatron_hybrid.platform.imports import importing
from megatron_hybrid.platform.warm import load

MOST_FDS = 64
FIRST_FREE = 512  # descriptors above are nobody's
FLAGS = ("-u", "-B")  # of Python, first, which mean nothing here
NAMESPACES = os.CLONE_NEWNS | os.CLONE_NEWUTS | os.CLONE_NEWIPC | os.CLONE_NEWPID
# What commands import beyond what ranks do.
COMMANDS = (
    "megatron_hybrid.cli", "megatron_hybrid.data.tokenizing.console", "megatron_hybrid.generation",
    "megatron_hybrid.smoke.check", "megatron_hybrid.testing.preload",
    "megatron_hybrid.upcycling.write", "matplotlib.pyplot",
    "checkpoints_converter.export", "checkpoints_converter.verify",
    "checkpoints_converter.inspection", "transformers.models.nemotron_h.modeling_nemotron_h",
    "megatron_hybrid.training.trackers.follow", "mlflow",  # not wandb, which the engine would use
    # What these import late, and what modules of tests do, in each of their ranks.
    "matplotlib.backends.backend_agg", "PIL.BmpImagePlugin", "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin", "rich._emoji_codes",
    "sentencepiece", "megatron_hybrid.data.plan_picture", "megatron_hybrid.evaluation.tasks",
    "megatron_hybrid.planner.memory", "megatron_hybrid.upcycling.request", "hypothesis",
)  # fmt: skip


class _Programs:
    """In the server: who is connected, and the fork of each."""

    def __init__(self, listener: socket.socket, folder: Path) -> None:
        self._listener, self._folder = listener, folder
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._end)
        self._running: dict[socket.socket, tuple[BaseProcess, int]] = {}

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with contextlib.suppress(OSError, ValueError):  # of a client that was killed meanwhile
            length, fds, _, _ = socket.recv_fds(connection, 8, MOST_FDS)
            with connection.makefile("rb") as file:
                request = json.loads(file.read(int.from_bytes(length, "big")))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            client = int.from_bytes(credentials[:4], sys.byteorder)
            process = multiprocessing.get_context("fork").Process(
                target=_fork, args=(request, fds, connection, client, self._folder / str(client))
            )
            process.start()
            for fd in fds:
                os.close(fd)
            assert process.pid is not None
            # Not multiprocessing's sentinel, which a program's own forks keep open.
            end = os.pidfd_open(process.pid)
            self._running[connection] = process, end
            self._selector.register(end, selectors.EVENT_READ, lambda: self._report(connection))
            self._selector.register(
                connection, selectors.EVENT_READ, lambda: self._kill(connection)
            )

    def _report(self, connection: socket.socket) -> None:
        """A program has ended."""
        if connection not in self._running:  # an event before this one in the same round was of it
            return
        process, end = self._running.pop(connection)
        self._selector.unregister(end)
        os.close(end)
        self._selector.unregister(connection)
        process.join()
        assert process.exitcode is not None
        with contextlib.suppress(OSError):
            connection.sendall(process.exitcode.to_bytes(8, "big", signed=True))
        connection.close()
        process.close()

    def _kill(self, connection: socket.socket) -> None:
        """A client was killed: so is its program."""
        if connection in self._running:
            self._running[connection][0].kill()
        self._report(connection)

    def _end(self) -> None:
        """The session has ended."""
        for process, _ in self._running.values():
            process.kill()
        os._exit(0)


def _fork(
    request: dict[str, Any], fds: list[int], connection: socket.socket, client: int, number: Path
) -> None:
    """In the fork: be what the client would have been, in its namespaces."""
    leave_handlers()
    if Path(f"/proc/{client}/ns/pid").samefile("/proc/self/ns/pid"):
        number.write_text(str(os.getpid()))
        _become(request, fds, connection)
        return
    os.setns(os.pidfd_open(client), NAMESPACES)
    program = os.fork()  # that of processes is for children only
    if program:
        for fd in fds:
            os.close(fd)
        number.write_text(str(program))
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    end_with_parent(signal.SIGKILL)  # the process between
    try:
        _become(request, fds, connection)
    except SystemExit as end:
        print(end.code, file=sys.stderr) if isinstance(end.code, str) else None
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
    os._exit(0)


def _become(request: dict[str, Any], fds: list[int], connection: socket.socket) -> None:
    """In the program's process: what was the client's becomes its own."""
    connection.sendall(os.getpid().to_bytes(8, "big"))
    for each in request["ignored"]:
        signal.signal(each, signal.SIG_IGN)
    os.setsid()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_FREE) for fd in fds]
    os.closerange(0, FIRST_FREE)
    for fd, number in zip(high, request["fds"], strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    # Python has None for a stream that is closed.
    sys.stdin, sys.stdout, sys.stderr = (
        _stream(fd) if fd in request["fds"] else None for fd in (0, 1, 2)
    )
    argv = request["argv"]
    while argv[0] in FLAGS:
        argv = argv[1:]
    multiprocessing.set_executable(request["python"])
    run_python(argv, request["environment"])


def _stream(fd: int) -> Any:
    errors = {0: "strict", 1: "strict", 2: "backslashreplace"}[fd]
    buffering = 1 if fd == 2 or os.isatty(fd) else -1
    return open(fd, "w" if fd else "r", buffering, "utf-8", errors, closefd=False)


def _main() -> None:
    load()
    with importing():
        for module in COMMANDS:
            importlib.import_module(module)
    gc.freeze()

    listener, folder = sys.argv[1:]
    _Programs(socket.socket(fileno=int(listener)), Path(folder)).serve()


if __name__ == "__main__":
    _main()
