"""Megatron's indexed files: token ids in `.bin`, document lengths and offsets in `.idx`.

The `.idx` holds, little-endian: the magic, version (u64), dtype code (u8), the number of sequences
n (u64), the number of document marks n + 1 (u64), n lengths (i32, tokens), n offsets (i64, bytes),
n + 1 marks (i64). Written here without the engine, so that preprocessing starts in no time, and
byte for byte as `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` writes it.
"""

import fcntl
import hashlib
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.fileio import sync_folder

logger = logging.getLogger(__name__)

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


@dataclass(frozen=True)
class IndexedFile:
    """An opened and checked `.bin`/`.idx` pair.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        document_lengths: `[n]` int32, tokens.
        index_sha256: of the whole `.idx`, so of everything that decides the order of samples.
    """

    prefix: Path
    document_lengths: NDArray[np.int32]
    index_sha256: str


def open_indexed(prefix: Path) -> IndexedFile:
    """Open a pair and check that both files are whole and belong together by size.

    Raises:
        DataError: a file is missing, cut short, of another format, or the sizes disagree.
    """
    bin_path, idx_path = indexed_paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"data.data_path: {path} is missing")
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise DataError(f"{idx_path} is not an index of Megatron's format")
        _, version, code, sequences, marks = _HEADER.unpack(header)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{idx_path} has version {version} and dtype code {code}; "
            f"allowed: version 1, dtype codes {sorted(_DTYPES)} (int32, uint16)"
        )
    expected_idx_bytes = _HEADER.size + 12 * sequences + 8 * marks
    if idx_path.stat().st_size != expected_idx_bytes:
        raise DataError(
            f"{idx_path} has {idx_path.stat().st_size} bytes; its header promises "
            f"{expected_idx_bytes}: it was cut short or damaged"
        )
    lengths = np.fromfile(idx_path, dtype="<i4", count=sequences, offset=_HEADER.size)
    expected_bin_bytes = int(lengths.sum(dtype=np.int64)) * _DTYPES[code].itemsize
    if bin_path.stat().st_size != expected_bin_bytes:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes; {idx_path.name} describes "
            f"{expected_bin_bytes}: the two are not from one run, or one was cut short"
        )
    return IndexedFile(prefix, lengths, digest)


def indexed_paths(prefix: Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of a prefix, which may itself hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedFileWriter:
    """Writes one pair so that it appears whole or not at all.

    Bytes go to `.part` files. `finish` makes them durable; `publish` removes the old `.idx`, then
    moves the `.bin`, then the new `.idx`: without an `.idx` nothing loads, so a kill at any moment
    leaves the old pair, no pair or the new pair, never a mixture.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Raises DataError if another process is writing this prefix."""
        self.token_count = 0
        self._dtype = token_dtype(vocab_size)
        self._bin_path, self._idx_path = indexed_paths(prefix)
        self._bin_part = Path(f"{self._bin_path}.part")
        self._idx_part = Path(f"{self._idx_path}.part")
        # The lock is on the file that is moved last, so it covers the whole of publish().
        self._idx_file = _open_locked(self._idx_part)
        self._bin_file = self._bin_part.open("wb")
        self._lengths: list[NDArray[np.int32]] = []

    def add_documents(self, tokens: bytes, lengths: NDArray[np.int32]) -> None:
        """Append documents: their ids in the file's dtype, end to end, and their lengths."""
        assert len(tokens) == int(lengths.sum(dtype=np.int64)) * self._dtype.itemsize
        self._bin_file.write(tokens)
        self._lengths.append(lengths)
        self.token_count += len(tokens) // self._dtype.itemsize

    def finish(self) -> None:
        """Write the index and make both `.part` files durable."""
        lengths = np.concatenate([np.empty(0, dtype="<i4"), *self._lengths])
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self._dtype.itemsize
        code = _DTYPE_CODES[self._dtype]
        self._idx_file.truncate(0)
        self._idx_file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for column in (lengths, offsets, np.arange(len(lengths) + 1, dtype="<i8")):
            self._idx_file.write(column.tobytes())
        for file in (self._bin_file, self._idx_file):
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Put the finished pair in place of whatever was there."""
        folder = self._idx_path.parent
        self._idx_path.unlink(missing_ok=True)
        sync_folder(folder)
        self._bin_part.replace(self._bin_path)
        sync_folder(folder)
        self._idx_part.replace(self._idx_path)
        sync_folder(folder)
        self._close()

    def discard(self) -> None:
        """Leave no trace; what was published before stays."""
        self._bin_part.unlink(missing_ok=True)
        self._idx_part.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._bin_file.close()
        self._idx_file.close()


def _open_locked(path: Path) -> IO[bytes]:
    """Open `path` for writing, held by this process alone until closed."""
    file = path.open("ab")
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
    return file
