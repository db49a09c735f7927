"""The seam of this package: a dataset is a sized row of windows of token ids.

Whoever plans the data (a plan of phases, megatron-core's own order, or the mock) hands the loader a
`Windows`; the loader knows nothing else about where tokens come from.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Windows(Protocol):
    """Windows `0 … len - 1`, already in training order; each a pure function of its number.

    Attributes:
        eod: the id that ends a document.
        vocab_size: ids lie in `[0, vocab_size)`.
        conversations: whether they are rows of whole conversations: then `document_ends` alone says
            where one ends, `eod` may stand within it, and `learnt` says what is to be learnt.
    """

    eod: int
    vocab_size: int
    conversations: bool

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The windows of a micro-batch, all of one sequence length.

        Returns:
            `[len(indices), seq_length + 1]` ids: one more than a sample, for the last label. They
            are what the files hold, which may be outside the vocabulary; `CheckedWindows` looks.
        """
        ...

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens of windows are the last of a document, though they may be no end tokens.

        Returns:
            `[len(indices), seq_length + 1]`; where a document ends with `eod`, either value.
        """
        ...

    def learnt(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        """Which tokens of windows of conversations are to be learnt.

        Returns:
            `[len(indices), seq_length + 1]`.
        """
        ...

    def describe(self, index: int, token: int) -> str:
        """Where a window's token comes from, for a message: file, document, and byte."""
        ...
