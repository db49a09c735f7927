"""The error of a rank, left where the others and the launcher find it: the first one is the cause.

When one rank fails, the others fail for want of it, often sooner than anybody reads. So each leaves
its error with the time in a file, and only the first is shown.
"""

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.human import say
from megatron_hybrid.json_text import parse_json

ERROR_FILE = "MEGATRON_HYBRID_ERROR_FILE"


@dataclass(frozen=True)
class RankError:
    """Attributes: when (seconds of the clock), which rank, on which host, in which step, what."""

    time: float
    rank: int
    host: str
    iteration: int | None
    text: str

    @property
    def summary(self) -> str:
        """The line that says most: the last of a traceback, of any other text the first."""
        lines = self.text.strip().splitlines() or ["no message"]
        return lines[-1] if lines[0].startswith("Traceback ") else lines[0]


@dataclass
class Position:
    """Where this rank is, for its error to say; the trainer keeps it up to date."""

    iteration: int | None = None


POSITION = Position()
_console: TextIO | None = None


def error_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its error."""
    return folder / f"error_rank_{rank:05d}.json"


def output_file(folder: Path, rank: int) -> Path:
    """Where a rank's output goes."""
    return folder / f"rank_{rank:05d}.txt"


def redirect_output(folder: Path, rank: int) -> None:
    """Of ranks that share a console: rank 0 keeps it, the others write to files in `folder`.

    All leave their errors there.
    """
    global _console
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[ERROR_FILE] = str(error_file(folder, rank))
    sys.stdout.flush()
    sys.stderr.flush()
    _console = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    if rank:
        with output_file(folder, rank).open("ab") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())


def record_error(text: str) -> bool:
    """In a rank: leave the error for others to show. False: nobody will, so the caller must.

    Where ranks share a console, the first one to fail shows its error there.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    rank = int(os.environ.get("RANK", "0"))
    error = RankError(time.time(), rank, socket.gethostname(), POSITION.iteration, text.rstrip())
    write_atomic(Path(path), json.dumps(asdict(error)))
    if _console is not None:
        say(error.text, sys.stderr)
        if _is_first(Path(path).parent):
            if rank:
                say(error.text, _console)
            if error.text.startswith("Traceback "):
                world = os.environ.get("WORLD_SIZE", "1")
                say(f"error: rank {rank} of {world} on {error.host} failed first", _console)
    return True


def _is_first(folder: Path) -> bool:
    """Whether no rank has asked before: one that fails for want of another asks after it."""
    try:
        (folder / "first_error").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def first_error(folder: Path) -> RankError | None:
    """The earliest error that a rank has left."""
    errors = [error for path in folder.glob("error_rank_*.json") if (error := read_error(path))]
    return min(errors, key=lambda error: (error.time, error.rank), default=None)


def read_error(path: Path) -> RankError | None:
    """An error; None where there is none, or its file is damaged."""
    try:
        return RankError(**parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
