"""Where the documents of a shard begin, looked up in its `.idx` when asked for.

An index may describe hundreds of millions of documents: nothing of it is held, and the documents
of a window are found by halving, in some thirty small reads.
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import cast, overload

import numpy as np

from megatron_hybrid.data.indexed import HEADER_BYTES, indexed_paths
from megatron_hybrid.data.open_files import OpenFiles
from megatron_hybrid.data.shard import Shard

_BLOCK = 128  # documents whose starts are read at once


class DocumentStarts(Sequence[int]):
    """The token with which each document of a shard begins, in order.

    A document is one sequence of the index, or, as Megatron-LM's `--split-sentences` writes them,
    the sequences from one of its marks to the next.
    """

    def __init__(self, shard: Shard, files: OpenFiles) -> None:
        self._shard = shard
        self._files = files
        self._path = indexed_paths(shard.prefix)[1]
        self._offsets_at = HEADER_BYTES + 4 * shard.sequences
        self._marks_at = self._offsets_at + 8 * shard.sequences
        self._one_sequence_each = shard.documents == shard.sequences

    def __len__(self) -> int:
        return self._shard.documents

    @overload
    def __getitem__(self, number: int) -> int: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[int]: ...
    def __getitem__(self, number: int | slice) -> int | Sequence[int]:
        assert isinstance(number, int)
        if not self._one_sequence_each:
            number = self._read(self._marks_at + 8 * number)
        if not 0 <= number < self._shard.sequences:  # nothing follows the last sentence
            return self._shard.tokens
        return self._read(self._offsets_at + 8 * number) // self._shard.dtype.itemsize

    def ends(self, first: int, count: int) -> list[int]:
        """Which of the tokens `[first, first + count)` are the last of a document."""
        number, end = bisect_right(self, first), first + count
        found: list[int] = []
        while number < len(self):
            starts = self._block(number)
            found += [start - 1 for start in starts if first < start <= end]
            number += len(starts)
            if starts[-1] > end:
                break
        if self._shard.tokens <= end:
            found.append(self._shard.tokens - 1)
        return found

    def _block(self, number: int) -> list[int]:
        """The starts of some documents from `number` on, at least one."""
        if not self._one_sequence_each:
            return [self[number]]
        content = bytearray(8 * min(_BLOCK, len(self) - number))
        at = self._offsets_at + 8 * number
        self._files.read(self._path, self._shard.idx_bytes, at, memoryview(content))
        offsets = np.frombuffer(content, dtype="<i8") // self._shard.dtype.itemsize
        return cast(list[int], offsets.tolist())

    def _read(self, at: int) -> int:
        content = bytearray(8)
        self._files.read(self._path, self._shard.idx_bytes, at, memoryview(content))
        return int(struct.unpack("<q", content)[0])
