"""Which source each slot of a blend belongs to: exact counts, even spacing, no list of slots.

Two sources share n slots as a line of slope c/n crosses the grid (Bresenham): of the first k slots,
`(k*c + n//2) // n` are the first one's. More sources share them through a Huffman tree of such
splits, which keeps heavy sources near the root, where they are spaced best. Both the source of a
slot and the counts before it are closed forms along one path of the tree.
"""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SLOTS = 2**40
_HALF = np.uint64(20)
_LOW = np.uint64(2**20 - 1)


class Proportions:
    """`sum(counts)` slots shared by sources so that source i has exactly `counts[i]` of them.

    Args:
        counts: slots of each source, 0 allowed; their sum is from 1 to `MAX_SLOTS`.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.slots = sum(counts)
        assert 0 < self.slots <= MAX_SLOTS
        # Nodes 0 ... S - 1 are the sources; those that join two others follow, the root last.
        self._sources = len(counts)
        self._root = next(source for source, count in enumerate(counts) if count)
        size = list(counts)
        joined: list[tuple[int, int]] = []
        heap = [(count, source) for source, count in enumerate(counts) if count]
        heapq.heapify(heap)
        while len(heap) > 1:
            (left_size, left), (right_size, right) = heapq.heappop(heap), heapq.heappop(heap)
            self._root = len(size)
            size.append(left_size + right_size)
            joined.append((left, right))
            heapq.heappush(heap, (left_size + right_size, self._root))
        self._node_size = size
        self._joined = joined
        self._size = np.array(size[len(counts) :], dtype=np.uint64)
        self._left_size = np.array([size[left] for left, _ in joined], dtype=np.uint64)
        self._children = np.array(joined, dtype=np.int64).reshape(-1, 2)

    def locate(self, slots: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """For each of `slots` `[n]`: its source, and how many slots before it are that source's."""
        rank = np.array(slots, dtype=np.uint64, ndmin=1)
        assert (rank < self.slots).all()
        node = np.full(rank.shape, self._root, dtype=np.int64)
        active = np.arange(rank.size if self._root >= self._sources else 0)
        while active.size:
            inner = node[active] - self._sources
            size, left_size, slot = self._size[inner], self._left_size[inner], rank[active]
            left_before, rest = _scaled(slot, left_size, size)
            is_right = rest + left_size < size
            node[active] = self._children[inner, is_right.astype(np.int64)]
            rank[active] = np.where(is_right, slot - left_before, left_before)
            active = active[node[active] >= self._sources]
        return node, rank

    def before(self, slot: int) -> list[int]:
        """How many of the slots `[0, slot)` each source has; `slot` may be the number of slots."""
        assert 0 <= slot <= self.slots
        before = [0] * len(self._node_size)
        before[self._root] = slot
        for node in range(len(self._node_size) - 1, self._sources - 1, -1):
            left, right = self._joined[node - self._sources]
            size = self._node_size[node]
            before[left] = (before[node] * self._node_size[left] + size // 2) // size
            before[right] = before[node] - before[left]
        return before[: self._sources]


def share_out(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to `weights`, exactly: the largest remainders are rounded up."""
    ratios = [weight.as_integer_ratio() for weight in weights]
    # Denominators of floats are powers of two, so the largest one is a multiple of all.
    denominator = max(each for _, each in ratios)
    parts = [numerator * (denominator // each) for numerator, each in ratios]
    whole = sum(parts)
    counts = [part * total // whole for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda number: -(parts[number] * total % whole))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _scaled(
    slot: NDArray[np.uint64], part: NDArray[np.uint64], whole: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """`divmod(slot * part + whole // 2, whole)`, all at most 2**40, by halves of 20 bits of `part`,
    since the product may have 80 bits."""
    high, rest = np.divmod(slot * (part >> _HALF), whole)
    low, rest = np.divmod((rest << _HALF) + slot * (part & _LOW) + (whole >> np.uint64(1)), whole)
    return (high << _HALF) + low, rest
