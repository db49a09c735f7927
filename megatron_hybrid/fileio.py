"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_hybrid.errors import UserError

# What is asked for ahead of a reader of large files.
_AHEAD_BYTES = 16 << 20


def read_ahead(descriptor: int, place: int) -> None:
    """Have what follows a place in a file read from the disk while the caller does other things.

    The kernel does so by itself for one reader who goes straight on, not for threads that take
    turns.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, place, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


@contextmanager
def file_errors(target: Path) -> Iterator[None]:
    """What the file system refuses while `target` is made is the user's to mend.

    Raises:
        UserError: naming the file and the system's reason.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        raise UserError(f"{target} could not be written: {where}{reason}") from error


def sync_folder(folder: Path) -> None:
    """Make the renames and removals done in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the file could not be written; what was at `path` before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
