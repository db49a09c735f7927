"""Megatron's indexed files: token ids in `.bin`, document lengths and offsets in `.idx`.

The `.idx` holds, little-endian: the magic, version (u64), dtype code (u8), the number of sequences
n (u64), the number of document marks n + 1 (u64), n lengths (i32, tokens), n offsets (i64, bytes),
n + 1 marks (i64). Written here without the engine, so that preprocessing starts in no time, and
byte for byte as `megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder` writes it.

Conversations have a file more, `.mask`: a byte for each token of the `.bin`, 1 where a model is to
learn it, else 0.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config.token_files import put_back, restore, set_aside
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import Facts, FileFacts, facts_path
from megatron_hybrid.data.part_file import PartFile, writing
from megatron_hybrid.fileio import sync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
HEADER_BYTES = _HEADER.size
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_INDEX_BLOCK = 1 << 20  # documents
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def masked_dtype(vocab_size: int) -> np.dtype[Any]:
    """A token of a conversation on its way to the files: its id, and its byte of the mask."""
    return np.dtype([("id", token_dtype(vocab_size)), ("learnt", "u1")])


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
    restore(str(prefix))
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"data.data_path: {path} is missing")
    with idx_path.open("rb") as file:
        dtype, sequences = read_header(file, idx_path)
        lengths = np.fromfile(file, dtype="<i4", count=sequences)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected_bin_bytes = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if bin_path.stat().st_size != expected_bin_bytes:
        raise DataError(
            f"{bin_path} has {bin_path.stat().st_size} bytes; {idx_path.name} describes "
            f"{expected_bin_bytes}: the two are not from one run, or one was cut short"
        )
    return IndexedFile(prefix, lengths, digest)


def read_header(file: IO[bytes], path: Path) -> tuple[np.dtype[Any], int]:
    """The type of the ids and the number of sequences n of an `.idx`, whose size must fit them.

    Leaves `file` at the n lengths, which the n offsets follow.

    Raises:
        DataError: another format, a type of ids that has no place here, or another size.
    """
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path} is not an index of Megatron's format")
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path} has version {version} and dtype code {code}; "
            f"allowed: version 1, dtype codes {sorted(_DTYPES)} (int32, uint16)"
        )
    size, promised = os.fstat(file.fileno()).st_size, _HEADER.size + 12 * sequences + 8 * marks
    if size != promised:
        raise DataError(
            f"{path} has {size} bytes; its header promises {promised}: it was cut short or damaged"
        )
    return _DTYPES[code], sequences


def indexed_paths(prefix: Path) -> tuple[Path, Path]:
    """The `.bin` and `.idx` of a prefix, which may itself hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def mask_path(prefix: Path) -> Path:
    """The `.mask` of a prefix, where its documents are conversations."""
    return Path(f"{prefix}.mask")


@dataclass(frozen=True)
class Written:
    """What an `IndexedFileWriter` wrote; the fields are those of `facts.Facts`."""

    bin: FileFacts
    idx: FileFacts
    dtype: Literal["uint16", "int32"]
    documents: int
    tokens: int
    longest_document_tokens: int
    highest_token: int
    mask: FileFacts | None
    learnt_tokens: int | None


class IndexedFileWriter:
    """Writes one pair, and what is beside it, so that they appear whole or not at all.

    Bytes go to `.part` files. `finish` makes the pair durable, `attach` the facts; `publish` moves
    them into place. Until then, and after a failure, what was published before is untouched.
    Holds 4 bytes of memory a document.
    """

    def __init__(self, prefix: Path, vocab_size: int, *, with_mask: bool = False) -> None:
        """Raises DataError if another process is writing this prefix, or no file can be made."""
        self.prefix = prefix
        self.token_count = 0
        self._learnt = 0
        self._dtype = token_dtype(vocab_size)
        self._masked = masked_dtype(vocab_size)
        self._lengths: list[NDArray[np.int32]] = []
        self._highest = 0
        paths = indexed_paths(prefix)
        with writing(prefix):
            # The lock is on the file that is moved last, so it covers the whole of publish().
            self._idx = PartFile(paths[1], locked=True)
            self._bin: PartFile | None = None
            self._mask: PartFile | None = None
            self._facts: PartFile | None = None
            try:
                put_back(str(prefix))  # of a kill while it was replaced
                self._bin = PartFile(paths[0])
                self._mask = PartFile(mask_path(prefix)) if with_mask else None
            except OSError:
                self.discard()
                raise

    def add_documents(self, tokens: bytes | memoryview, lengths: NDArray[np.int32]) -> None:
        """Append documents: their ids in the file's dtype, end to end, and their lengths.

        With a mask, in place of ids: tokens of `masked_dtype`.

        Raises:
            DataError: the file cannot be written, as on a full disk.
        """
        assert self._bin is not None
        if self._mask is not None:
            masked = np.frombuffer(tokens, dtype=self._masked)
            learnt, tokens = masked["learnt"], masked["id"].tobytes()
            self._learnt += int(learnt.sum(dtype=np.int64))
            with writing(self.prefix):
                self._mask.write(learnt.tobytes())
        ids = np.frombuffer(tokens, dtype=self._dtype)
        assert len(ids) == int(lengths.sum(dtype=np.int64))
        if len(ids):
            self._highest = max(self._highest, int(ids.max()))
        with writing(self.prefix):
            self._bin.write(tokens)
        self._lengths.append(lengths)
        self.token_count += len(ids)

    def finish(self) -> Written:
        """Write the index and make the `.part` files durable.

        Raises:
            DataError: a file cannot be written.
        """
        assert self._bin is not None
        lengths = np.concatenate([np.empty(0, dtype="<i4"), *self._lengths])
        with writing(self.prefix):
            for block in _index_blocks(lengths, self._dtype):
                self._idx.write(block)
            return Written(
                bin=self._bin.sync(),
                idx=self._idx.sync(),
                dtype="uint16" if self._dtype.itemsize == 2 else "int32",
                documents=len(lengths),
                tokens=self.token_count,
                longest_document_tokens=int(lengths.max(initial=0)),
                highest_token=self._highest,
                mask=None if self._mask is None else self._mask.sync(),
                learnt_tokens=None if self._mask is None else self._learnt,
            )

    def attach(self, facts: Facts) -> None:
        """Have `publish` put these facts beside the pair.

        Raises:
            DataError: the file cannot be written.
        """
        with writing(self.prefix):
            self._facts = PartFile(facts_path(self.prefix))
            self._facts.write(facts.to_json().encode())
            self._facts.sync()

    def publish(self) -> None:
        """Put the finished pair in place of whatever was there; see `publish_all`."""
        publish_all([self])

    def discard(self) -> None:
        """Leave no trace; what was published before stays, or is put back."""
        if self._idx.is_open:
            with suppress(OSError):
                put_back(str(self.prefix))
        # The index last: it holds the lock.
        for part in (self._facts, self._mask, self._bin, self._idx):
            if part is not None:
                part.discard()

    def _retract(self) -> None:
        set_aside(str(self.prefix))

    def _move_tokens(self) -> None:
        for part in (self._bin, self._mask, self._facts):
            if part is not None:
                part.publish()

    def _move_index(self) -> None:
        self._idx.publish()

    def _drop_old(self) -> None:
        put_back(str(self.prefix))


def publish_all(writers: Sequence[IndexedFileWriter]) -> None:
    """Put finished pairs that belong together in place of whatever was there.

    Every old `.idx` goes aside first and every new one comes last: without an `.idx` nothing loads,
    so there is never a mixture. Killed at any moment, a prefix has its old pair, which whoever
    looks for it puts back (`config.token_files.restore`), until its new `.idx` has its name.

    Raises:
        DataError: a file cannot be moved; the old pair is put back by whoever looks for it.
    """
    folders = {writer.prefix.parent for writer in writers}
    moves = (
        IndexedFileWriter._retract,
        IndexedFileWriter._move_tokens,
        IndexedFileWriter._move_index,
        IndexedFileWriter._drop_old,
    )
    for move in moves:
        for writer in writers:
            with writing(writer.prefix, "run it again"):
                move(writer)
        for folder in folders:
            sync_folder(folder)


def _index_blocks(lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The content of an `.idx`, in blocks: many documents would need much memory at once."""
    count = len(lengths)
    yield _HEADER.pack(_MAGIC, 1, _DTYPE_CODES[dtype], count, count + 1)
    for begin in range(0, count, _INDEX_BLOCK):
        yield lengths[begin : begin + _INDEX_BLOCK].astype("<i4").tobytes()
    offset = 0  # in bytes
    for begin in range(0, count, _INDEX_BLOCK):
        sizes = lengths[begin : begin + _INDEX_BLOCK].astype("<i8") * dtype.itemsize
        ends = offset + np.cumsum(sizes)
        yield (ends - sizes).tobytes()
        offset = int(ends[-1])
    for begin in range(0, count + 1, _INDEX_BLOCK):
        yield np.arange(begin, min(begin + _INDEX_BLOCK, count + 1), dtype="<i8").tobytes()
