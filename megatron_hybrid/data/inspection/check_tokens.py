"""Whether the ids of a `.bin` lie in the vocabulary, and documents end where they should."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.index import Index
from megatron_hybrid.data.inspection.verdict import Verdict, Wrong


class TokenCheck:
    """Looks at the content of a `.bin` as it is read.

    Args:
        index: of the pair, with sound lengths.
        vocab_size: ids must lie in `[0, vocab_size)`; None: at least 0.
        eod: id with which every document must end; None: any.

    Attributes:
        highest: the highest id seen; -1 before any.
    """

    def __init__(self, index: Index, vocab_size: int | None, eod: int | None) -> None:
        self.highest = -1
        self._index = index
        self._vocab_size = vocab_size
        self._eod = eod
        self._seen = 0  # tokens
        self._ends = _Ends(index.lengths())
        self._out_of_range, self._bad_ends = Wrong(), Wrong()

    def take(self, content: bytes) -> None:
        """The next part of the file, of whole ids but for the file's end."""
        dtype = self._index.dtype
        ids = np.frombuffer(content, dtype, count=len(content) // dtype.itemsize)
        if not len(ids):
            return
        self.highest = max(self.highest, int(ids.max()))
        self._check_range(ids)
        if self._eod is not None:
            self._check_ends(ids, self._eod)
        self._seen += len(ids)

    def report(self, verdict: Verdict) -> None:
        """To be called at the end of the file."""
        self._out_of_range.report(verdict)
        self._bad_ends.report(verdict)

    def _check_range(self, ids: NDArray) -> None:
        too_high = self._vocab_size is not None and self.highest >= self._vocab_size
        if not too_high and int(ids.min()) >= 0:  # nearly always: two passes instead of four
            return
        limit = np.iinfo(np.int64).max if self._vocab_size is None else self._vocab_size
        i = self._out_of_range.add((ids < 0) | (ids >= limit))
        if i is None:
            return
        allowed = f"0 … {limit - 1}" if self._vocab_size is not None else "0 and above"
        self._out_of_range.text = (
            f"{self._index.describe(self._seen + i)}: id {ids[i]} is outside the vocabulary "
            f"({allowed})"
        )

    def _check_ends(self, ids: NDArray, eod: int) -> None:
        ends = self._ends.until(self._seen + len(ids))
        last = ids[ends - 1 - self._seen]
        i = self._bad_ends.add(last != eod)
        if i is not None:
            self._bad_ends.text = (
                f"{self._index.describe(int(ends[i]) - 1)}: the document ends with id {last[i]}, "
                f"not with the end token {eod}"
            )


class _Ends:
    """The tokens before which documents end, in order."""

    def __init__(self, blocks: Iterator[NDArray[np.int32]]) -> None:
        self._blocks = blocks
        self._ends = np.empty(0, np.int64)  # not given yet
        self._sum = 0

    def until(self, limit: int) -> NDArray[np.int64]:
        """The next ends, up to `limit`."""
        given = [np.empty(0, np.int64)]
        while True:
            count = int(np.searchsorted(self._ends, limit, side="right"))
            given.append(self._ends[:count])
            self._ends = self._ends[count:]
            lengths = None if len(self._ends) else next(self._blocks, None)
            if lengths is None:
                return np.concatenate(given)
            self._ends = self._sum + np.cumsum(lengths, dtype=np.int64)
            self._sum = int(self._ends[-1])
