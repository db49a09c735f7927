"""One writer a folder: who writes into the folder of a run, or of checkpoints, claims it first.

A claim is a small file, `.writer.json`, that says who holds it and changes every few seconds while
its holder lives. Locks of file systems would do less: many cluster file systems have none, or only
within a node. A start that finds a claim

  - of a process that is gone, on its own machine, or of an earlier start of its own Slurm job,
    takes it over at once;
  - of a process that lives, on its own machine, is refused at once;
  - of another machine, watches: where the claim changes, it is refused; where it stands still for
    DEAD_AFTER_S, its holder is dead, and the claim is taken over.

So a run that was killed, or whose node is lost, starts again without anybody's help. A holder that
was taken for dead, and was not, finds out before it saves (`refuse_if_lost`).
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launchers import slurm
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import file_errors
from megatron_hybrid.json_text import parse_json

logger = logging.getLogger(__name__)

CLAIM_FILE = ".writer.json"
BEAT_S = 3.0
DEAD_AFTER_S = 30.0
_POLL_S = 0.5
_SETTLE_S = 0.5  # of two starts that take over the same claim, the later one has it then


class ClaimedError(UserError):
    """Somebody who lives writes there."""


@dataclass(frozen=True)
class Claim:
    """Who writes there.

    Attributes:
        what: the command.
        machine: names boot and process namespace; processes of equal ones see each other.
        ticks: when the process began, in ticks since the boot: a number is given out again.
        job, restarts: of Slurm; empty and 0 elsewhere.
        beats: how often the holder has said that it lives.
    """

    token: str
    what: str
    host: str
    machine: str
    pid: int
    ticks: int | None
    job: str
    restarts: int
    since: str
    beats: int = 0

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.what} on {self.host} (process {self.pid}{job}), since {self.since}"

    def encoded(self) -> bytes:
        """Of equal length for any number of beats: it is written in place."""
        return json.dumps(asdict(self) | {"beats": f"{self.beats:012d}"}).encode()


def claim_file(folder: Path) -> Path:
    """Where the claim on a folder is."""
    return folder / CLAIM_FILE


@contextmanager
def claimed(paths: Sequence[Path], what: str) -> Iterator[None]:
    """Hold claims for the time of the block.

    Args:
        paths: files (`claim_file`); their folders are made.
        what: the command, for others to read.

    Raises:
        UserError: somebody who lives writes there, or the file cannot be written.
    """
    mine = _new_claim(what)
    held: list[_Held] = []
    made: list[Path] = []
    try:
        for path in sorted({path.parent.resolve() / path.name for path in paths}):
            with file_errors(path.parent):
                made += _make_folder(path.parent)
                held.append(_Held(path, _acquire(path, mine)))
            _HELD[path] = held[-1]
        with _beating(held):
            yield
    finally:
        for each in held:
            each.release()
            _HELD.pop(each.path, None)
        for folder in reversed(made):
            with suppress(OSError):  # something is in it now
                folder.rmdir()


def refuse_if_alive(paths: Sequence[Path]) -> None:
    """Refuse, without a claim of one's own, where a process of this machine surely writes.

    Raises:
        UserError: naming it.
    """
    mine = _new_claim("")
    for path in paths:
        other = _read(path)
        if other is not None and _lives(other, mine):
            raise _refusal(path, other)


def refuse_if_lost(path: Path) -> None:
    """Before writing: a claim that this process has made is still its own.

    Raises:
        UserError: another start has taken it over; what is there now is that one's.
    """
    held = _HELD.get(path.parent.resolve() / path.name)
    if held is None:
        return
    other = _read(path)
    if other is not None and other.token != held.claim.token:
        raise UserError(
            f"{_place(path)} was taken over by {other}, for which this process looked dead; "
            "nothing more is written here"
        )


class _Held:
    """A claim of this process."""

    def __init__(self, path: Path, claim: Claim) -> None:
        self.path = path
        self.claim = claim

    def beat(self) -> None:
        """Change the file, in place: one that has replaced it is not touched."""
        self.claim = replace(self.claim, beats=self.claim.beats + 1)
        with suppress(OSError), self.path.open("r+b", buffering=0) as file:
            found = _decode(file.read())
            if found is None or found.token == self.claim.token:
                file.seek(0)
                file.write(self.claim.encoded())
                os.fsync(file.fileno())

    def release(self) -> None:
        with suppress(OSError):
            found = _read(self.path)
            if found is not None and found.token == self.claim.token:
                self.path.unlink()


_HELD: dict[Path, _Held] = {}  # by this process


@contextmanager
def _beating(held: Sequence[_Held]) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            for each in held:
                each.beat()

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _acquire(path: Path, mine: Claim) -> Claim:
    """Claim a file; the claim.

    Raises:
        UserError: somebody who lives holds it.
    """
    while not _create(path, mine):
        seen = _read(path)
        if seen is None and not path.exists():
            continue  # released in between
        if seen is not None and _lives(seen, mine):
            raise _refusal(path, seen)
        if seen is None or not _is_gone(seen, mine):
            changed = _watch(path, seen)
            if changed is not None:
                raise _refusal(path, changed)
            if not path.exists():
                continue
        logger.info("%s: %s is gone; this start takes over", _place(path), seen or "its writer")
        new = path.with_name(f"{path.name}.{mine.token}.part")
        new.write_bytes(mine.encoded())
        new.replace(path)
        time.sleep(_SETTLE_S)
        now = _read(path)
        if now is not None and now.token != mine.token:
            raise _refusal(path, now)
        return mine
    return mine


def _watch(path: Path, seen: Claim | None) -> Claim | None:
    """Whether a claim changes: what it became; None where it stood still, or was given up."""
    logger.info(
        "%s: claimed by %s; looking for %g s whether it still lives",
        _place(path), seen or "somebody", DEAD_AFTER_S,
    )  # fmt: skip
    until = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until and path.exists():
        time.sleep(_POLL_S)
        now = _read(path)
        if now is not None and now != seen:
            return now
    return None


def _create(path: Path, mine: Claim) -> bool:
    try:
        with path.open("xb") as file:
            file.write(mine.encoded())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _lives(other: Claim, mine: Claim) -> bool:
    """Whether a holder surely lives: a process that can be seen from here."""
    return other.machine == mine.machine and _ticks(other.pid) == other.ticks is not None


def _is_gone(other: Claim, mine: Claim) -> bool:
    """Whether a holder is surely dead."""
    if other.machine == mine.machine and other.ticks is not None:
        return not _lives(other, mine)
    # The scheduler starts a job again when it has ended it.
    return bool(mine.job) and other.job == mine.job and other.restarts < mine.restarts


def _place(path: Path) -> Path:
    """What a claim is on: its folder, or what stands beside it under its name."""
    return (
        path.with_name(path.name.removeprefix(".").removesuffix(CLAIM_FILE))
        if (path.name != CLAIM_FILE)
        else path.parent
    )


def _refusal(path: Path, other: Claim) -> ClaimedError:
    return ClaimedError(
        f"{_place(path)} is being written by {other}; one at a time: wait for it, end it, or give "
        "this one a folder of its own"
    )


def _read(path: Path) -> Claim | None:
    """None: there is none, or it is half written."""
    try:
        return _decode(path.read_bytes())
    except OSError:
        return None


def _decode(data: bytes) -> Claim | None:
    try:
        values = parse_json(data)
        return Claim(**values | {"beats": int(values["beats"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _new_claim(what: str) -> Claim:
    job = slurm.job_name(os.environ)
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    pid = os.getpid()
    return Claim(
        token=uuid.uuid4().hex, what=what, host=socket.gethostname(), machine=_machine(), pid=pid,
        ticks=_ticks(pid), job=f"{cluster}:{job}".strip(":") if job else "",
        restarts=int(restarts) if restarts.isdigit() else 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )  # fmt: skip


def _machine() -> str:
    """What processes that see each other share: the boot of a machine, and numbers of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _ticks(pid: int) -> int | None:
    """When a process began; None: there is none, or its end waits to be noticed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in b"ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder; those of it and its parents that were not there, outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]
