"""Documents in a random order, within a bounded memory.

A document's place is decided by a 64-bit key, a function of the seed and of the document's number
in the input: the order depends neither on the memory nor on the number of processes. What does not
fit into memory is written, sorted, to a run; at the end each run gives its part of one range of
keys after the other, each range as large as the memory.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Ranges of keys are made of bins: how many tokens each holds is counted as runs are written.
_BIN_BITS = 16
_BLOCK_BYTES = 4 << 20


def document_keys(seed: int, first: int, count: int) -> NDArray[np.uint64]:
    """The keys `[count]` of documents `first`, `first + 1`, ...: no two are equal.

    The SplitMix64 generator (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014), started at a hash of the seed.
    """
    start = int.from_bytes(hashlib.sha256(f"document order {seed}".encode()).digest()[:8], "little")
    numbers = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    keys = numbers * np.uint64(0x9E3779B97F4A7C15) + np.array([start], dtype=np.uint64)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass
class _Run:
    """A file of documents in the order of their keys: keys (u64), lengths (i32), tokens.

    Attributes:
        next_document: the first that has not been read back.
        next_byte: where its tokens begin in the file.
    """

    path: Path
    documents: int
    next_byte: int
    next_document: int = 0


def shuffle_folder(prefix: Path) -> Path:
    """Where the documents of a prefix wait that do not fit into memory; removed in the end."""
    return Path(f"{prefix}.shuffle.part")


class DocumentShuffler:
    """Takes documents in the order of the input and gives them in the order of their keys."""

    def __init__(self, folder: Path, token_bytes: int, seed: int, memory_bytes: int) -> None:
        """
        Args:
            folder: for the runs; made when it is needed, removed by `discard`.
            token_bytes: of one id.
            memory_bytes: how much to hold; one document, or 2^-16 of all, is always held.
        """
        self._folder = folder
        self._token_bytes = token_bytes
        self._seed = seed
        # The system hands out pages as they are written to: a small input takes little.
        self._buffer = np.empty(memory_bytes, dtype=np.uint8)
        self._used = 0
        self._lengths: list[NDArray[np.int32]] = []
        self._first = 0  # number of the first document in the buffer
        self._runs: list[_Run] = []
        self._bin_tokens = np.zeros(1 << _BIN_BITS, dtype=np.int64)

    def add_documents(self, tokens: bytes, lengths: NDArray[np.int32]) -> None:
        """Take documents: their ids end to end, and their lengths in tokens.

        Raises:
            OSError: a run cannot be written.
        """
        if self._used + len(tokens) > len(self._buffer):
            self._write_run()
            self._reserve(len(tokens))
        self._buffer[self._used : self._used + len(tokens)] = np.frombuffer(tokens, dtype=np.uint8)
        self._used += len(tokens)
        self._lengths.append(lengths)

    def documents(self) -> Iterator[tuple[bytes, NDArray[np.int32]]]:
        """Give all documents, in blocks of some megabytes: their ids end to end, their lengths.

        Raises:
            OSError: a run cannot be written or read.
        """
        if not self._runs:
            yield from self._sorted(*self._buffered())
            return
        self._write_run()
        for end in self._ranges():
            yield from self._sorted(*self._read_range(end))

    def discard(self) -> None:
        """Remove the runs."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _buffered(self) -> tuple[memoryview, NDArray[np.uint64], NDArray[np.int32]]:
        lengths = np.concatenate([np.empty(0, dtype=np.int32), *self._lengths])
        keys = document_keys(self._seed, self._first, len(lengths))
        return self._buffer[: self._used].data, keys, lengths

    def _sorted(
        self, tokens: memoryview, keys: NDArray[np.uint64], lengths: NDArray[np.int32]
    ) -> Iterator[tuple[bytes, NDArray[np.int32]]]:
        sizes = lengths.astype(np.int64) * self._token_bytes
        ends = np.cumsum(sizes)
        order = np.argsort(keys)
        block = np.cumsum(sizes[order]) // _BLOCK_BYTES
        for part in np.split(order, np.flatnonzero(np.diff(block)) + 1):
            places = zip((ends - sizes)[part].tolist(), ends[part].tolist(), strict=True)
            yield b"".join([tokens[begin:end] for begin, end in places]), lengths[part]

    def _write_run(self) -> None:
        if not self._used:
            return
        tokens, keys, lengths = self._buffered()
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"run_{len(self._runs):06d}"
        order = np.argsort(keys)
        with path.open("wb") as file:
            file.write(keys[order].tobytes())
            file.write(lengths[order].astype("<i4").tobytes())
            self._runs.append(_Run(path, len(keys), file.tell()))
            for block, _ in self._sorted(tokens, keys, lengths):
                file.write(block)
        bins = (keys >> np.uint64(64 - _BIN_BITS)).astype(np.int64)
        tokens_of_bins = np.bincount(bins, weights=lengths, minlength=1 << _BIN_BITS)
        self._bin_tokens += tokens_of_bins.astype(np.int64)
        self._first += len(keys)
        self._lengths.clear()
        self._used = 0

    def _ranges(self) -> Iterator[int]:
        """The bins at which ranges of keys end: each fits into the buffer, or is a single bin."""
        totals = np.cumsum(self._bin_tokens) * self._token_bytes
        end = before = 0
        while end < len(totals):
            fitting = int(np.searchsorted(totals, before + len(self._buffer), side="right"))
            end = max(fitting, end + 1)
            before = int(totals[end - 1])
            yield end

    def _read_range(self, end: int) -> tuple[memoryview, NDArray[np.uint64], NDArray[np.int32]]:
        """The documents of all runs below bin `end` that have not been read."""
        keys, lengths = [], []
        self._used = 0
        for run in self._runs:
            begin, stop = run.next_document, self._first_at(run, end)
            with run.path.open("rb") as file:
                file.seek(8 * begin)
                keys.append(np.fromfile(file, "<u8", stop - begin))
                file.seek(8 * run.documents + 4 * begin)
                lengths.append(np.fromfile(file, "<i4", stop - begin))
                size = int(lengths[-1].sum(dtype=np.int64)) * self._token_bytes
                self._reserve(size)
                file.seek(run.next_byte)
                file.readinto(self._buffer[self._used : self._used + size].data)
            self._used += size
            run.next_document, run.next_byte = stop, run.next_byte + size
        return self._buffer[: self._used].data, np.concatenate(keys), np.concatenate(lengths)

    def _first_at(self, run: _Run, end: int) -> int:
        """The number, within the run, of the first document at or above bin `end`."""
        if end == 1 << _BIN_BITS:
            return run.documents
        keys = np.memmap(run.path, dtype="<u8", mode="r", shape=(run.documents,))
        return int(np.searchsorted(keys, np.uint64(end << (64 - _BIN_BITS))))

    def _reserve(self, size: int) -> None:
        """Make room for `size` more bytes."""
        if self._used + size > len(self._buffer):
            larger = np.empty(self._used + size, dtype=np.uint8)
            larger[: self._used] = self._buffer[: self._used]
            self._buffer = larger
