"""An `.idx`, read in blocks: a large one describes hundreds of millions of documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import indexed_paths, read_header

_BLOCK = 1 << 20  # entries


class Index:
    """The index of a prefix; its columns are read when they are asked for.

    Attributes:
        path: of the `.idx`.
        dtype: of the ids in the `.bin`.
        documents: how many.

    Raises:
        DataError: it is missing, cannot be read, or is no whole index.
    """

    def __init__(self, prefix: Path) -> None:
        self._bin_path, self.path = indexed_paths(prefix)
        try:
            with self.path.open("rb") as file:
                self.dtype: np.dtype[Any]
                self.dtype, self.documents = read_header(file, self.path)
                self._lengths_at = file.tell()
        except FileNotFoundError as error:
            raise DataError(f"{self.path} is missing") from error
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        self._offsets_at = self._lengths_at + 4 * self.documents
        self._marks_at = self._offsets_at + 8 * self.documents
        self._mark_count = (self.path.stat().st_size - self._marks_at) // 8

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        """Blocks of the documents' lengths in tokens."""
        return self._blocks("<i4", self._lengths_at, self.documents)

    def offsets(self) -> Iterator[NDArray[np.int64]]:
        """Blocks of the bytes of the `.bin` at which documents begin, cut as `lengths` is."""
        return self._blocks("<i8", self._offsets_at, self.documents)

    def marks(self) -> Iterator[NDArray[np.int64]]:
        """Blocks of the sequences with which documents begin: each document's own number."""
        return self._blocks("<i8", self._marks_at, self._mark_count)

    def place(self, document: int) -> tuple[int, int]:
        """The byte of the `.bin` at which a document begins, and its length in tokens.

        Raises:
            DataError: there is no such document.
        """
        if not 0 <= document < self.documents:
            allowed = f"0 … {self.documents - 1}" if self.documents else "none"
            raise DataError(f"{self.path}: there is no document {document}; allowed: {allowed}")
        offset = self._read("<i8", self._offsets_at + 8 * document, 1)
        length = self._read("<i4", self._lengths_at + 4 * document, 1)
        return int(offset[0]), int(length[0])

    def document_at(self, token: int) -> tuple[int, int] | None:
        """The document that holds a token of the `.bin`, and the token's place in it.

        Counts up from the first document, by lengths; None: the token is behind the last one.
        """
        first, begin = 0, 0
        for lengths in self.lengths():
            ends = begin + np.cumsum(lengths, dtype=np.int64)
            if token < ends[-1]:
                inside = int(np.searchsorted(ends, token, side="right"))
                return first + inside, token - int(ends[inside] - lengths[inside])
            first, begin = first + len(lengths), int(ends[-1])
        return None

    def describe(self, token: int) -> str:
        """Where a token of the `.bin` is, for a message: file, document, and byte."""
        found = self.document_at(token)
        where = f"document {found[0]}, token {found[1]}" if found else "behind the last document"
        return f"{self._bin_path}: {where} (byte {token * self.dtype.itemsize})"

    def _blocks(self, dtype: str, at: int, count: int) -> Iterator[NDArray[Any]]:
        itemsize = np.dtype(dtype).itemsize
        for begin in range(0, count, _BLOCK):
            yield self._read(dtype, at + begin * itemsize, min(_BLOCK, count - begin))

    def _read(self, dtype: str, at: int, count: int) -> NDArray[Any]:
        return np.fromfile(self.path, dtype=dtype, count=count, offset=at)
