"""One training of the smoke test: the public command, in processes of its own, and its losses."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from launchers.environment import own_code
from launchers.errors import ERROR_FILE
from launchers.forks import Fork
from megatron_hybrid.platform.warm import load_for_forks
from megatron_hybrid.training.metrics import METRICS_FILE, read_records

SHOWN_LINES = 40
END_GRACE_S = 20.0
# Each training of a launcher's ranks gets a port of its own: the launcher's is in use by itself.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


class RunFailedError(Exception):
    """A training ended with an error; the text is the end of what it printed."""


@dataclass(frozen=True)
class Ranks:
    """Who runs the test: this process for all ranks, or one of a launcher's.

    Attributes:
        world_size: ranks of every run but those of one rank.
        rank: None where this process starts the ranks itself.
    """

    world_size: int
    rank: int | None = None

    @property
    def reports(self) -> bool:
        """Whether this process compares and prints."""
        return self.rank in (None, 0)


def train(words: list[str], ranks: Ranks, run_number: int, *, alone: bool = False) -> float:
    """Run `pretrain WORDS` to its end.

    Args:
        run_number: from 0, the same on all ranks of a launcher.
        alone: on one rank, whatever there are.

    Returns:
        The seconds that it took.

    Raises:
        RunFailedError: it ended with an error; the last thing that `pretrain` prints is that of
            the rank that failed first.
    """
    command = ["-m", "megatron_hybrid.cli", "pretrain", *words]
    environment = os.environ | own_code(os.environ)
    environment.pop(ERROR_FILE, None)  # that of the process above, which has more to say
    if ranks.rank is None:
        command += ["--nproc", str(1 if alone else ranks.world_size)]
    else:
        _join_ranks(environment, run_number, alone)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = _start(command, environment, output.fileno())
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        if code:
            output.seek(0)
            lines = output.read().splitlines()[-SHOWN_LINES:]
            shown = " ".join([sys.executable, *command])
            raise RunFailedError("\n".join([shown, f"exit code {code}", *lines]))
    return time.monotonic() - began


def _join_ranks(environment: dict[str, str], run_number: int, alone: bool) -> None:
    """A rank's environment for one run: the launcher's, or that of the only rank."""
    # torchrun's own store keeps the keys of the runs before: rank 0 opens another each time.
    for name in [name for name in environment if name.startswith("TORCHELASTIC_")]:
        del environment[name]
    environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + 1 + run_number)
    if alone:
        only = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment.update(only)


def _start(
    command: list[str], environment: dict[str, str], output: int
) -> "subprocess.Popen[bytes] | Fork":
    """Python with these words: without GPUs a fork, which has torch and the engine loaded."""
    if load_for_forks():
        return Fork(command, environment, output)
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdin=subprocess.DEVNULL, stdout=output,
        stderr=output,
    )  # fmt: skip


def _end(process: "subprocess.Popen[bytes] | Fork") -> None:
    """Let a training save and end, as it does on SIGTERM; kill it if it does not."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_losses(run_dir: Path) -> dict[int, float]:
    """{step: loss} of a run's metrics."""
    records = read_records(run_dir / METRICS_FILE)
    return {each["iteration"]: each["loss"] for each in records if each["kind"] == "train"}
