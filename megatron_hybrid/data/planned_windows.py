"""The windows of a plan, read from its sources."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.conversations import ConversationSource
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.source import Source
from megatron_hybrid.data.tokenizer import Tokenizer

_CHUNK = 1024  # samples whose places are computed at once: alone, one would cost as much
_CHUNKS = 4


class PlannedWindows:
    """The samples of a plan as windows of ids (`megatron_hybrid.data.windows.Windows`).

    Args:
        plan: which window every sample is.
        sources: opened, by name; those of the plan.
        tokenizer: the one the sources were made with.
    """

    def __init__(self, plan: Plan, sources: Mapping[str, Source], tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        self._plan = plan
        self._sources = [sources[source.name] for source in plan.sources]
        self.conversations = all(isinstance(each, ConversationSource) for each in self._sources)
        self._places: dict[int, tuple[list[int], list[int], list[int]]] = {}  # by chunk

    def __len__(self) -> int:
        return self._plan.samples

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Windows of one sequence length L: `[n, L + 1]` ids.

        Raises:
            DataError: a file cannot be read, or is no longer the one that was opened.
        """
        places = [self._place(index) for index in indices]
        windows = np.empty((len(places), places[0][2] + 1), dtype=np.int64)
        for (source, offset, seq_length), window in zip(places, windows, strict=True):
            assert len(window) == seq_length + 1, "samples read together are of one length"
            self._sources[source].read(offset, window)
        return windows

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        """By the files' index; see `megatron_hybrid.data.windows.Windows`.

        Raises:
            DataError: as `__getitems__`.
        """
        places = [self._place(index) for index in indices]
        ends = np.zeros((len(places), places[0][2] + 1), dtype=np.bool_)
        for (source, offset, _), row in zip(places, ends, strict=True):
            row[self._sources[source].document_ends(offset, len(row))] = True
        return ends

    def learnt(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        """By the files' masks; see `megatron_hybrid.data.windows.Windows`.

        Raises:
            DataError: as `__getitems__`.
        """
        places = [self._place(index) for index in indices]
        found = np.zeros((len(places), places[0][2] + 1), dtype=np.bool_)
        for (number, offset, _), row in zip(places, found, strict=True):
            source = self._sources[number]
            assert isinstance(source, ConversationSource)
            source.read_learnt(offset, row)
        return found

    def describe(self, index: int, token: int) -> str:
        """Where a window's token comes from: source, file, document, and byte."""
        source, offset, _ = self._place(index)
        return self._sources[source].describe(offset + token)

    def _place(self, index: int) -> tuple[int, int, int]:
        """The source, the first token and the sequence length of a sample."""
        chunk, row = divmod(index, _CHUNK)
        places = self._places.pop(chunk, None)
        if places is None:
            end = min((chunk + 1) * _CHUNK, self._plan.samples)
            located = self._plan.locate(np.arange(chunk * _CHUNK, end))
            # Lists: taking one number out of an array costs ten times as much.
            places = (
                located.sources.tolist(),
                located.offsets.tolist(),
                located.seq_lengths.tolist(),
            )
            if len(self._places) == _CHUNKS:
                del self._places[next(iter(self._places))]
        self._places[chunk] = places  # as the last one used
        sources, offsets, lengths = places
        return sources[row], offsets[row], lengths[row]
