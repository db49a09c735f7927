"""The windows of a micro-batch as the process that reads them hands them on: looked at, or refused.

Documents end with the end token, and where the index of their file says so, as in files that were
written without end tokens.

An id outside the vocabulary would read, or on a GPU end the program, where no one can say which
file it came from.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.windows import Windows

LEARNT = 1 << 32  # above any id


class CheckedWindows:
    """Windows whose ids are held against the vocabulary, wherever they come from.

    Args:
        windows: of a plan, of megatron-core's order, or made up.
        mark_ends: give the last token of a document as its complement, `~id`, which is below 0, and
            one of a conversation that is to be learnt as `id + LEARNT`: so one tensor tells all.
    """

    def __init__(self, windows: Windows, *, mark_ends: bool) -> None:
        self._windows = windows
        self._mark_ends = mark_ends

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64] | DataError:
        """As `Windows.__getitems__`.

        What is wrong is a result: torch would make of an error that a reading process raises
        another one, whose text is that process's traceback.
        """
        try:
            rows = self._windows.__getitems__(indices)
            self._check(rows, indices)
            if self._mark_ends:
                is_end = self._windows.document_ends(indices)
                if self._windows.conversations:
                    rows = rows + LEARNT * self._windows.learnt(indices)
                else:
                    is_end |= rows == self._windows.eod
                rows = np.where(is_end, ~rows, rows)
        except DataError as error:
            return error
        return rows

    def _check(self, rows: NDArray[np.int64], indices: Sequence[int]) -> None:
        """Raises DataError for the first of the ids `[n, L + 1]` outside the vocabulary."""
        vocab_size = self._windows.vocab_size
        # As unsigned numbers, ids below 0 are the largest: one pass looks both ways.
        outside = rows.view(np.uint64) >= vocab_size
        if not outside.any():
            return
        row, token = divmod(int(outside.argmax()), rows.shape[1])
        raise DataError(
            f"{self._windows.describe(indices[row], token)}: id {rows[row, token]} is outside the "
            f"vocabulary (0 … {vocab_size - 1}): the files are damaged, or were made with another "
            "tokenizer"
        )
