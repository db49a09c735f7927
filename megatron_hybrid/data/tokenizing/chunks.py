"""Files cut into chunks of whole lines: the unit of work of a worker.

Plain JSONL is cut by position alone, and workers read it; what must be decompressed is read here,
chunk by chunk, so that memory is bounded whatever the size of the file.
"""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing.inputs import Input, reading, reading_parquet

# Large enough that handing a chunk over costs nothing, small enough for a smooth progress bar.
CHUNK_BYTES = 1 << 20
# A line is held in memory whole; a longer one is not a document but another format.
MAX_LINE_BYTES = 1 << 30
_SCAN_BYTES = 1 << 16


@dataclass(frozen=True)
class ByteRange:
    """Lines of a plain file: its bytes from `begin` to `end`."""

    path: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Lines:
    """Lines of a compressed file, decompressed."""

    content: bytes


@dataclass(frozen=True)
class Rows:
    """Rows of a parquet file: for each key the UTF-8 of each row, None where it is null."""

    columns: list[list[bytes | None]]


@dataclass(frozen=True)
class Chunk:
    """A piece of one input.

    Attributes:
        payload: what a worker is given.
        bytes: of text, about.
        file: number of the input.
        position: bytes of the file, on disk, that have been read at the end of this chunk.
    """

    payload: ByteRange | Lines | Rows
    bytes: int
    file: int
    position: int


def cut(inputs: Sequence[Input], keys: Sequence[str]) -> Iterator[Chunk]:
    """All chunks of all inputs, in order.

    Raises:
        DataError: a file cannot be read to its end, or a line is longer than `MAX_LINE_BYTES`.
    """
    for number, item in enumerate(inputs):
        if item.format == "parquet":
            yield from _rows(item, number, keys)
        elif item.format == "jsonl":
            yield from _byte_ranges(item, number)
        else:
            yield from _decompressed(item, number)


def range_at(item: Input, position: int) -> Chunk:
    """A few whole lines of a plain file, from the first that begins at or after `position`.

    Raises:
        DataError: the file cannot be read.
    """
    with reading(item.path), item.path.open("rb") as file:
        begin = _line_end(file, position, item.bytes) if position else 0
        end = _line_end(file, begin + _SCAN_BYTES, item.bytes)
    return Chunk(ByteRange(item.path, begin, end), end - begin, 0, end)


def _byte_ranges(item: Input, number: int) -> Iterator[Chunk]:
    begin = 0
    with reading(item.path), item.path.open("rb") as file:
        while begin < item.bytes:
            end = _line_end(file, begin + CHUNK_BYTES, item.bytes)
            _check_line(end - begin - CHUNK_BYTES, item.path)
            yield Chunk(ByteRange(item.path, begin, end), end - begin, number, end)
            begin = end


def _line_end(file: IO[bytes], wanted: int, size: int) -> int:
    """The first end of a line at or after `wanted`, or the end of the file, which has `size`."""
    position = wanted - 1  # a line that ends exactly there must not drag in the next one
    file.seek(position)
    while block := file.read(_SCAN_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return size


def _decompressed(item: Input, number: int) -> Iterator[Chunk]:
    with reading(item.path):
        if item.format == "gzip":
            with item.path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as file:
                yield from _lines(item, number, file.read, raw.tell)
        else:
            import pyarrow as pa

            with pa.OSFile(str(item.path)) as raw, pa.CompressedInputStream(raw, "zstd") as file:
                yield from _lines(item, number, file.read, raw.tell)


def _lines(
    item: Input, number: int, read: Callable[[int], bytes], position: Callable[[], int]
) -> Iterator[Chunk]:
    pieces: list[bytes] = []  # of a line that has not ended yet
    while block := read(CHUNK_BYTES):
        cut_at = block.rfind(b"\n") + 1
        if cut_at:
            content = b"".join([*pieces, block[:cut_at]])
            yield Chunk(Lines(content), len(content), number, position())
            pieces, block = [], block[cut_at:]
        if block:
            pieces.append(block)
        _check_line(sum(map(len, pieces)), item.path)
    if pieces:
        content = b"".join(pieces)
        yield Chunk(Lines(content), len(content), number, position())


def _check_line(length: int, path: Path) -> None:
    if length > MAX_LINE_BYTES:
        raise DataError(
            f"--input {path} has a line of more than {MAX_LINE_BYTES >> 30} GiB; JSONL has one "
            "document a line; nothing was published"
        )


def _rows(item: Input, number: int, keys: Sequence[str]) -> Iterator[Chunk]:
    """Chunks within row groups: a row group may be larger than memory."""
    from pyarrow import parquet

    done = 0
    with reading_parquet(item.path), parquet.ParquetFile(item.path) as file:
        total = file.metadata.num_rows
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            rows = max(1, about.num_rows * CHUNK_BYTES // max(1, about.total_byte_size))
            for batch in file.iter_batches(rows, [group], columns=list(keys)):
                done += len(batch)
                columns = [_as_bytes(batch.column(key)) for key in keys]
                position = item.bytes * done // total
                yield Chunk(Rows(columns), batch.nbytes, number, position)


def _as_bytes(column: Any) -> list[bytes | None]:
    """Not as text: one row that is no UTF-8 must not cost the others."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary()).to_pylist()
