"""Made-up documents that a model can learn, for tests and speed measurements without data."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_STRIDE = 8


class MockWindows:
    """Windows of counting sequences: each document starts anywhere and goes on by one stride.

    Documents are 2 to `seq_length` tokens long (2 where that is 1) and end with `eod`, so a window
    usually holds a few.
    Window i depends on `seed` (any integers >= 0) and i alone.
    """

    conversations = False

    def __init__(
        self, *, size: int, seq_length: int, vocab_size: int, eod: int, seed: tuple[int, ...]
    ) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self._size = size
        self._seq_length = seq_length
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.stack([self._window(index) for index in indices])

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        return np.zeros((len(indices), self._seq_length + 1), dtype=np.bool_)

    def learnt(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        raise NotImplementedError

    def describe(self, index: int, token: int) -> str:
        return f"window {index} of made-up tokens, token {token}"

    def _window(self, index: int) -> NDArray[np.int64]:
        if not 0 <= index < self._size:
            raise IndexError(f"window {index} of {self._size}")
        random = np.random.default_rng((*self._seed, index))
        window = np.empty(self._seq_length + 1, dtype=np.int64)
        filled = 0
        while filled < len(window):
            document = self._document(random)[: len(window) - filled]
            window[filled : filled + len(document)] = document
            filled += len(document)
        return window

    def _document(self, random: np.random.Generator) -> NDArray[np.int64]:
        words = int(random.integers(1, max(self._seq_length, 2)))
        first, stride = random.integers(0, self.vocab_size), random.integers(1, _MAX_STRIDE + 1)
        ids = (first + stride * np.arange(words, dtype=np.int64)) % (self.vocab_size - 1)
        # The words are all ids but eod.
        return np.append(ids + (ids >= self.eod), self.eod)
