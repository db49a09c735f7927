"""How long documents are: exact sums and quantiles, in memory that their count leaves alone."""

import numpy as np
from numpy.typing import NDArray

# Lengths below are counted one by one, in 8 MiB; the few longer ones are kept.
_COUNTED = 1 << 20


class Lengths:
    """The lengths of many documents in tokens.

    Attributes:
        documents: how many.
        tokens: their sum.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.tokens = 0
        self._counts = np.zeros(_COUNTED, dtype=np.int64)
        self._long = np.empty(0, dtype=np.int32)  # sorted when it is asked

    def add(self, block: NDArray[np.int32]) -> None:
        """Count lengths, which must be at least 0."""
        counts = np.bincount(block[block < _COUNTED])
        self._counts[: len(counts)] += counts
        self._long = np.append(self._long, block[block >= _COUNTED])
        self.documents += len(block)
        self.tokens += int(block.sum(dtype=np.int64))

    def merge(self, other: "Lengths") -> None:
        """Count all that another one has counted."""
        self._counts += other._counts
        self._long = np.append(self._long, other._long)
        self.documents += other.documents
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        return self.tokens / self.documents

    def quantile(self, fraction: float) -> int:
        """The shortest length that at least this fraction of the documents do not exceed."""
        rank = max(int(np.ceil(fraction * self.documents)), 1)
        ends = np.cumsum(self._counts)
        if rank <= ends[-1]:
            return int(np.searchsorted(ends, rank))
        return int(np.sort(self._long)[rank - 1 - ends[-1]])

    def histogram(self, edges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Documents, and tokens in them, of each bin `edges[i] <= length < edges[i + 1]`."""
        lengths = np.flatnonzero(self._counts)
        values = np.concatenate([lengths, self._long])
        counts = np.concatenate([self._counts[lengths], np.ones(len(self._long), np.int64)])
        bins = np.searchsorted(edges, values, side="right") - 1
        documents = np.zeros(len(edges) - 1, dtype=np.int64)
        tokens = np.zeros(len(edges) - 1, dtype=np.int64)
        np.add.at(documents, bins, counts)
        np.add.at(tokens, bins, counts * values)
        return documents, tokens
