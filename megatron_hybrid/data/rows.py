"""Documents put into rows of one length, whole, so that little of a row is left empty.

Best fit: each document, in order, goes into the open row with the least room that it fits into.
Only the emptiest rows stay open, so it takes the same time a document, however many there are.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_OPEN = 256  # rows


@dataclass(frozen=True)
class Rows:
    """Which documents each row holds.

    Attributes:
        documents: `[n]` int64, those that are in a row, row by row.
        firsts: `[rows + 1]` int64, where in `documents` each row begins.
    """

    documents: NDArray[np.int64]
    firsts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, row: int) -> list[int]:
        """The documents of a row."""
        found: list[int] = self.documents[self.firsts[row] : self.firsts[row + 1]].tolist()
        return found


def pack_rows(lengths: NDArray[np.int64], row_tokens: int) -> Rows:
    """Put documents into rows.

    Args:
        lengths: `[n]`, tokens of each, at most `row_tokens`; those of 0 are in no row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of the open rows: tokens that are free, and which row
    for document, length in enumerate(lengths.tolist()):
        if not length:
            continue
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            if len(rooms) == _OPEN:
                del rooms[0]
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(document)
        if room > length:
            insort(rooms, (room - length, row))
    counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    flat = (document for row in rows for document in row)
    return Rows(
        np.fromiter(flat, dtype=np.int64, count=int(counts.sum())),
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
    )
