"""The process that copies a run's metrics to one tracker while the run goes on.

    python -m megatron_hybrid.training.trackers.follow

Standard input is a line of JSON, the target, and then says how the run ended, in a line; that it is
closed without one says that the run was cut off. What cannot be sent is a warning, and is tried
again.
"""

import fcntl
import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.log import JSON, LEVEL, Level, show_log
from megatron_hybrid.small_files import naming, read_json
from megatron_hybrid.training.metrics import METRICS_FILE
from megatron_hybrid.training.trackers.base import Target, Tracker
from megatron_hybrid.training.trackers.rows import Row, Rows

logger = logging.getLogger("megatron_hybrid.training.trackers.follow")  # also as a program

FOLDER = "trackers"  # of a run
PREFIX = "end "
_POLL_S = 1.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 15.0, 600.0
# Fields of `Target.options` that say where a run is, not what it is called.
_NAMES = ("exp_name", "run_name")


def make_tracker(target: Target) -> Tracker:
    """The tracker of a target's kind; loads its library on `open`."""
    if target.kind == "wandb":
        from megatron_hybrid.training.trackers.wandb import WandB

        return WandB(target)
    from megatron_hybrid.training.trackers.mlflow import MLflow

    return MLflow(target)


@dataclass
class Copy:
    """The copy of a run's metrics in one tracker, brought up to date by `advance`.

    Args:
        target: what is copied where.
        make: what makes the tracker; a test's own.
    """

    target: Target
    make: Callable[[Target], Tracker] = make_tracker

    def __post_init__(self) -> None:
        self._rows = Rows(self.target.run_dir / METRICS_FILE)
        self._waiting: list[Row] = []
        self._tracker: Tracker | None = None

    def advance(self, *, last: bool) -> None:
        """Send what is new. Raises what the tracker raises; what it has not got is sent again."""
        self._waiting += self._rows.read(last=last)
        if self._tracker is None:
            tracker, known = self.make(self.target), _known(self.target)
            if known is None:
                _remember(self.target, None)  # for `track`, should nothing be reached
            tracker.open(known, lambda run: _remember(self.target, run))
            self._tracker = tracker
            _note_steps_done_again(self.target, tracker.last_step)
        while self._waiting:
            self._tracker.send(self._waiting[0])
            del self._waiting[0]

    def close(self, reason: str | None) -> None:
        """Say how the run ended; see `Tracker.close`."""
        assert self._tracker is not None
        self._tracker.close(reason)


def follow(copy: Copy, ended: Callable[[float], tuple[bool, str | None]]) -> None:
    """Copy until the run has ended.

    Args:
        ended: waits so many seconds at most; whether the run has ended, and how.
    """
    kind, failed_at, pause = copy.target.kind, None, _FIRST_RETRY_S
    while True:
        over, reason = ended(_POLL_S)
        if not over and failed_at is not None and time.monotonic() < failed_at + pause:
            continue
        try:
            copy.advance(last=over)
            if over:
                copy.close(reason)
        except Exception as error:
            if failed_at is None or over:
                _warn(copy.target, error)
            pause = _FIRST_RETRY_S if failed_at is None else min(2 * pause, _LONGEST_RETRY_S)
            failed_at = time.monotonic()
        else:
            if failed_at is not None:
                logger.info("%s: has everything again", kind)
            failed_at = None
        if over:
            return


def _warn(target: Target, error: Exception) -> None:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    logger.warning(
        "warning: %s cannot be reached: %s\n%s has what it lacks: it is sent when that is possible "
        "again, or by `megatron-hybrid track %s`",
        *(target.kind, text, METRICS_FILE, target.run_dir),
    )


def _note_steps_done_again(target: Target, last_step: int) -> None:
    """Say which steps a service keeps as an earlier start had them: a step is not sent twice."""
    done = target.begins_after
    if done is not None and last_step > done:
        logger.warning(
            "note: %s has steps to %d of an earlier start: those from %d on are done again, and "
            "stay there as they were; %s has them as they are now",
            target.kind, last_step, done + 1, METRICS_FILE,
        )  # fmt: skip


def _place(target: Target) -> Path:
    return target.run_dir / FOLDER / f"{target.kind}.json"


def _identity(options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _NAMES}


def _known(target: Target) -> str | None:
    """The id of an earlier start of this run, in the same place; None also of another run's, whose
    folder was copied.
    """
    path = _place(target)
    if not path.exists():
        return None
    found = _read(path)
    if _identity(found["options"]) != _identity(target.options):
        return None
    if target.begins_after is not None and (other := _copied_from(path, found)) is not None:
        logger.warning(
            "note: %s is a copy of %s, which goes on in %s as it did: this one is a run of its own "
            "there", target.run_dir, other, target.kind,
        )  # fmt: skip
        return None
    return found["run"] and str(found["run"])


def _copied_from(path: Path, found: dict[str, Any]) -> Path | None:
    """The folder of the run whose id a file has, where that is another one which has it still."""
    if not isinstance(found["run_dir"], str) or not found["run"]:
        return None
    there = Path(found["run_dir"])
    first = there / FOLDER / path.name
    try:
        if first.samefile(path) or _read(first)["run"] != found["run"]:
            return None
    except (OSError, UserError):  # it is gone, moved here, or of another machine
        return None
    return there


def _read(path: Path) -> dict[str, Any]:
    """What `_remember` wrote."""
    found = read_json(path, fields=("run", "name", "run_dir", "options", "config"))
    with naming(path):
        options, config = dict(found["options"]), dict(found["config"])
        kept = {"run": found["run"], "name": found["name"], "run_dir": found.get("run_dir")}
        return kept | {"options": options, "config": config}


def _remember(target: Target, run: str | None) -> None:
    """What a later start, or `track`, needs: the run's id there (None: it has none), and all that
    makes it one.
    """
    path = _place(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "run": run, "name": target.name, "run_dir": str(target.run_dir),
        "options": target.options, "config": target.config,
    }  # fmt: skip
    write_atomic(path, json.dumps(facts, indent=1).encode() + b"\n")


def known_targets(run_dir: Path) -> list[Target]:
    """The targets that a run's starts have had."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        facts = _read(path)
        found.append(Target(path.stem, run_dir, facts["name"], facts["options"], facts["config"]))
    return found


@contextmanager
def alone(target: Target, *, wait: bool) -> Iterator[None]:
    """Within it no other process copies the same metrics to the same tracker.

    Raises:
        UserError: another does, and `wait` is False.
    """
    path = _place(target).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{target.run_dir} is being copied to {target.kind} by its run"
            ) from None
        yield


@contextmanager
def own_temp_folder() -> Iterator[None]:
    """Within it, temporary files of this process are in a folder that is gone afterwards: W&B makes
    some that it leaves.
    """
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="trackers-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before[1]
            if before[0] is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before[0]


def _run_ended(parent: int) -> Callable[[float], tuple[bool, str | None]]:
    """For `follow`: by what standard input says, or by who this process's parent is."""

    def ended(seconds: float) -> tuple[bool, str | None]:
        readable, _, _ = select.select([sys.stdin], [], [], seconds)
        if readable:
            line = sys.stdin.readline()
            return True, line.removeprefix(PREFIX).strip() or None
        # Others that the rank has forked hold the other end too.
        return os.getppid() != parent, None

    return ended


def main() -> None:
    """See the file's first lines."""
    # A scheduler's signals are for the run, whose end is seen here; what it has left is still sent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    show_log(Level(os.environ.get(LEVEL) or Level.INFO), as_json=os.environ.get(JSON) == "1")
    parent = os.getppid()
    facts = parse_json(sys.stdin.readline())
    target = Target(**{**facts, "run_dir": Path(facts["run_dir"])})
    with alone(target, wait=True), own_temp_folder():
        follow(Copy(target), _run_ended(parent))


def start_line(target: Target) -> bytes:
    """A target as the line that `main` reads."""
    return json.dumps(asdict(target), default=str).encode() + b"\n"


if __name__ == "__main__":
    main()
