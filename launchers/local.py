"""Start N ranks on this machine, as torchrun would.

Each rank finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, so
torchrun itself, or anything else that sets them, starts the same program just as well. What this
launcher does that torchrun does not: a signal reaches every rank exactly once and is waited for as
long as saving takes, the last thing on the screen is the error of the rank that failed first, and
ranks can be forks of the launcher, so that torch is imported once and not N times.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from launchers.environment import own_code
from launchers.errors import ERROR_FILE, error_file, output_file, read_error
from launchers.forks import Fork, end_with_parent
from launchers.place import ATTEMPT, free_port
from megatron_hybrid.human import say

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_POLL_S = 0.05


def launch(
    argv: Sequence[str],
    nproc: int,
    grace_s: float = 10.0,
    logs: Path | None = None,
    *,
    forks: bool = False,
) -> int:
    """Run `python *argv` on `nproc` ranks, and wait for all of them.

    Args:
        argv: words for Python, such as `-m megatron_hybrid.cli pretrain tiny`.
        nproc: how many ranks.
        grace_s: after one rank has failed, how long the others may take to notice by themselves.
        logs: what ranks print (all but rank 0) and their errors are kept in a folder there; None:
            they are not kept.
        forks: ranks are forks of this process, with what it has imported; not with GPUs.

    Returns:
        The exit code: 0, that of the rank that failed first, or 128 + the signal that ended it.
    """
    attempt = os.environ.get(ATTEMPT) or f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="megatron-hybrid-") as temporary:
        folder = Path(temporary) if logs is None else logs / attempt
        folder.mkdir(parents=True, exist_ok=True)
        ranks = _Ranks(argv, nproc, folder, attempt, forks)
        previous = {
            number: signal.signal(number, ranks.forward)
            for number in FORWARDED
            if signal.getsignal(number) is not signal.SIG_IGN  # as nohup leaves SIGHUP
        }
        try:
            ranks.start()
            return ranks.wait(grace_s)
        finally:
            ranks.end()
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Ranks:
    """The processes of a run; `folder` keeps what they print (all but rank 0) and their errors."""

    def __init__(
        self, argv: Sequence[str], nproc: int, folder: Path, attempt: str, forks: bool
    ) -> None:
        self._argv = argv
        self._forks = forks
        self._nproc = nproc
        self._folder = folder
        self._attempt = attempt
        self._processes: list[subprocess.Popen[bytes] | Fork] = []

    def start(self) -> None:
        """Start every rank. Rank 0 writes to the console, the others to files."""
        shared = os.environ | {
            "WORLD_SIZE": str(self._nproc),
            "LOCAL_WORLD_SIZE": str(self._nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            ATTEMPT: self._attempt,
            **own_code(os.environ),
        }
        cores = len(os.sched_getaffinity(0))
        shared.setdefault("OMP_NUM_THREADS", str(max(1, cores // self._nproc)))
        for rank in range(self._nproc):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                ERROR_FILE: str(error_file(self._folder, rank)),
            }
            with output_file(self._folder, rank).open("wb") as file:
                output = None if rank == 0 else file.fileno()
                self._processes.append(self._start_rank(shared | own, output))

    def _start_rank(
        self, environment: dict[str, str], output: int | None
    ) -> "subprocess.Popen[bytes] | Fork":
        # Ctrl-C in a terminal goes to a whole session: each rank has its own, to get it once.
        if self._forks:
            return Fork(self._argv, environment, output)
        return subprocess.Popen(
            [sys.executable, *self._argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: pass the signal on to every rank that runs."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, grace_s: float) -> int:
        """Wait until all ranks have ended; a failure ends the others and is shown."""
        deadline = None
        while any(process.poll() is None for process in self._processes):
            if deadline is None and any(process.poll() for process in self._processes):
                deadline = time.monotonic() + grace_s
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        failed = {rank: p.returncode for rank, p in enumerate(self._processes) if p.returncode}
        self.end()
        return self._show_first(failed) if failed else 0

    def end(self) -> None:
        """Kill what still runs, with the processes that the ranks started."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _show_first(self, failed: dict[int, int]) -> int:
        """Print the error of the rank that failed first; return its exit code."""
        errors = {rank: read_error(error_file(self._folder, rank)) for rank in failed}
        # A rank that could not say anything is taken for the first.
        rank = min(failed, key=lambda rank: (error.time if (error := errors[rank]) else 0, rank))
        code, error = failed[rank], errors[rank]
        if error is not None:
            say(error.text, sys.stderr)
            if error.text.startswith("Traceback "):
                say(f"error: rank {rank} of {self._nproc} failed first", sys.stderr)
        else:
            lines = output_file(self._folder, rank).read_text(errors="replace").splitlines()[-30:]
            say("\n".join(lines), sys.stderr)
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            say(f"error: rank {rank} of {self._nproc} ended by {cause}", sys.stderr)
        return 128 - code if code < 0 else code
