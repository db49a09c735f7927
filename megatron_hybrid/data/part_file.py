"""A large file that appears whole or not at all: written as `.part`, hashed on the way, moved."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import FileFacts

logger = logging.getLogger(__name__)


def part_path(path: Path) -> Path:
    """Where a file is written before it has its name."""
    return Path(f"{path}.part")


class PartFile:
    """A file that is being written, `<path>.part`, until `publish` gives it its name.

    What a killed process left in the `.part` is overwritten. All methods raise OSError where the
    file system refuses.
    """

    def __init__(self, path: Path, *, locked: bool = False) -> None:
        """Open the `.part`.

        Args:
            path: the name that the file will have.
            locked: hold it against other processes until it is published or discarded.

        Raises:
            DataError: another process holds it.
        """
        self.path = path
        self._part = part_path(path)
        self._hash = hashlib.sha256()
        self._bytes = 0
        # Unbuffered: nothing is left to be written when it is closed after an error.
        self._file = _open_locked(self._part) if locked else self._part.open("wb", buffering=0)

    @property
    def is_open(self) -> bool:
        """Whether it is neither published nor discarded."""
        return not self._file.closed

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._hash.update(data)
        self._bytes += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def sync(self) -> FileFacts:
        """Make what was written durable; gives its size and checksum."""
        os.fsync(self._file.fileno())
        return FileFacts(bytes=self._bytes, sha256=self._hash.hexdigest())

    def publish(self) -> None:
        """Give the file its name, in place of an older one; the caller syncs the folder."""
        self._part.replace(self.path)
        self._file.close()

    def discard(self) -> None:
        """Remove the `.part`; does nothing after `publish`."""
        if not self._file.closed:
            self._part.unlink(missing_ok=True)
            self._file.close()


@contextmanager
def writing(path: Path, outcome: str = "nothing was published") -> Iterator[None]:
    """Turn an OSError, as of a full disk, into a DataError that names `path` and what follows."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; {outcome}") from error


def _open_locked(path: Path) -> IO[bytes]:
    """Open `path` for writing, empty, held by this process alone until closed."""
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have published it between the two calls: then this is no longer a .part.
        still_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        still_there = False
    except OSError as error:  # some cluster file systems have no locks
        logger.warning("%s: %s; write it from one run at a time", path, error.strerror)
        still_there = True
    if not still_there:
        file.close()
        raise DataError(f"another process is writing {path.with_suffix('')}")
    file.truncate(0)
    return file
