"""Run one command in a forked process, and say what came of it."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 120  # of one command, on a busy machine
MEMORY_BYTES = 12 << 30  # beyond it a process gets no more: what asks for all there is, must say so
# Words that no message meant for a user holds.
INTERNAL = (
    "Traceback (most recent call last)", "AssertionError", "IndexError:", "KeyError:",
    "TypeError:", "AttributeError:", "ZeroDivisionError:", "RecursionError", "UnboundLocalError",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """How a command ended.

    Attributes:
        code: exit status; None where it had to be killed.
        output: all that it printed.
    """

    code: int | None
    output: str

    def fault(self) -> str | None:
        """What is wrong with this ending, whatever the input; None where it is right."""
        if self.code is None:
            return f"not finished after {LIMIT_S} s"
        if inside := [word for word in INTERNAL if word in self.output]:
            return f"the output holds {inside[0]!r}"
        if self.code not in (0, 1, 2, 75):
            return f"ended with {self.code}"
        if self.code and not self.output.strip():
            return "failed without a word"
        return None


def run(words: Sequence[str], folder: Path) -> Found:
    """Run `megatron-hybrid WORDS...` in `folder`, forked from a process that has loaded it all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_hybrid.testing.preload", "tests.mutations.outcome"])
    output = folder / "output.txt"
    output.unlink(missing_ok=True)
    process = context.Process(target=_command, args=(list(words), str(folder), str(output)))
    process.start()
    process.join(LIMIT_S)
    code = process.exitcode
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):  # it leads a group, which may outlive it
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    process.close()
    text = output.read_text(errors="replace") if output.exists() else ""
    return Found(code, text)


def _command(words: list[str], folder: str, output: str) -> None:
    import resource

    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["megatron-hybrid", *words]
    from megatron_hybrid.cli import main

    main()
