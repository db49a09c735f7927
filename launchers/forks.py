"""Python programs as forks of this process: what it has imported, they need not import again.

Importing torch and the engine is most of what a small run on a CPU takes, and each rank would do
the same. A process that has begun with CUDA must not fork: its children could not use the GPU.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Fork:
    """A running `python *argv`, with what of `subprocess.Popen` a launcher needs.

    Args:
        argv: words for Python: `-m MODULE WORDS…`, `-c PROGRAM WORDS…` or `SCRIPT WORDS…`.
        environment: its own, whole; `OMP_NUM_THREADS` is heeded, other variables that libraries
            read as they are loaded come too late.
        output: a file descriptor for its stdout and stderr; None: this process's.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], output: int | None = None
    ) -> None:
        process = multiprocessing.get_context("fork").Process(
            target=_run, args=(list(argv), dict(environment), output)
        )
        # A signal before the child has left our handlers behind would be taken for the launcher's.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert process.pid is not None
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's: of a process that a signal ended, the signal's number, negative."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Whether it has ended: its returncode."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended: its returncode.

        Raises:
            subprocess.TimeoutExpired: it has not after `timeout` seconds.
        """
        if timeout is not None and self.poll() is None:
            # Not by multiprocessing's sentinel, which its own children keep open.
            ended = os.pidfd_open(self.pid)
            try:
                if not select.select([ended], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a fork", timeout)
            finally:
                os.close(ended)
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """In a new process: get this signal if the parent is killed, by default to save (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _run(argv: list[str], environment: dict[str, str], output: int | None) -> None:
    """In the fork: become what a start of Python would be, and run the program."""
    leave_handlers()
    os.setsid()
    end_with_parent()
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
    run_python(argv, environment)


def leave_handlers() -> None:
    """Python's own way with signals, and none blocked; what is ignored stays so, as over exec."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def run_python(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """In a process of its own that has forked: run `python *argv` to its end.

    Raises:
        SystemExit: as the program does.
    """
    atexit._clear()  # what the process before us has to do at its end
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # that of TMPDIR as it was, where an import has asked for it
    threads = environment.get("OMP_NUM_THREADS", "")  # read as OpenMP was loaded, before this
    if threads.isdigit() and int(threads) and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    try:
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            sys.modules.pop(argv[1], None)  # it becomes __main__, as in a Python of its own
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(argv[1], main.__dict__)
        else:
            sys.argv = list(argv)
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
