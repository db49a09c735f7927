"""The stream of a source: its windows in the order of training, epoch after epoch.

The tokens that may be drawn (a region of the source) are cut into blocks. Each epoch permutes the
blocks; the windows of a group of blocks that follow each other there are permuted among themselves.
So window number n of a source is a function of its own name, the seed and the sequence length, and
of no other source, phase or length of the run. After a change of sequence length a source goes on
at the next whole group, so nothing is read twice in an epoch.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.permutation import derive, permute

_BASE_ORDER = 2**40  # a number that no epoch has


@dataclass(frozen=True)
class Position:
    """How far a source has been read: `windows` windows of `seq_length` tokens since its start,
    those counted that a change of sequence length has skipped."""

    seq_length: int
    windows: int


@dataclass(frozen=True)
class PlannedSource:
    """A source as a plan knows it: sizes and digests, no paths.

    Attributes:
        name: as in the config; part of the key of its order.
        shards: for each of its files in order, a digest of its size and contents.
        tokens: of all its shards.
        begin, end: the region `[begin, end)` that windows are drawn from; a window of L tokens
            and its last label, L + 1 tokens, lie inside it.
        block_tokens: tokens of a block, at least as many as the longest sequence.
        fraction: of the blocks, that exist for the run; which ones, `name` and the seed decide.
    """

    name: str
    shards: tuple[str, ...]
    tokens: int
    begin: int
    end: int
    block_tokens: int
    fraction: float = 1.0

    @property
    def region_blocks(self) -> int:
        """Whole blocks in the region, whose last label lies in it too."""
        return max(0, (self.end - self.begin - 1) // self.block_tokens)

    @cached_property
    def blocks(self) -> int:
        """Blocks of an epoch; above 0 where the region has one."""
        # The fraction that was written: 0.1 of 10 blocks is 1, not the 2 of the float above it.
        return math.ceil(Fraction(str(self.fraction)) * self.region_blocks)

    def epoch_windows(self, seq_length: int) -> int:
        """Windows of an epoch."""
        return self.blocks * (self.block_tokens // seq_length)

    def epochs(self, position: Position | None) -> Fraction:
        """Passes over the source up to a position; None: it was never read."""
        if position is None:
            return Fraction(0)
        return Fraction(position.windows, self.epoch_windows(position.seq_length))

    def group_blocks(self, seq_length: int) -> int:
        """Blocks in a group. Windows that are whole blocks are permuted as such and need none; else
        a 64th of the source at most, so that little is skipped where the length changes."""
        if self.block_tokens // seq_length == 1:
            return 1
        return min(64, max(1, self.blocks // 64))

    def resume(self, position: Position | None, seq_length: int) -> int:
        """The number of the first window of `seq_length` tokens that holds nothing read before
        `position` in its epoch: the very next one, or the first of the next whole group."""
        if position is None:
            return 0
        if position.seq_length == seq_length:
            return position.windows
        epoch, windows = divmod(position.windows, self.epoch_windows(position.seq_length))
        touched = -(-windows // (self.block_tokens // position.seq_length))
        touched = _round_up(touched, self.group_blocks(position.seq_length))
        first = min(self.blocks, _round_up(touched, self.group_blocks(seq_length)))
        return (epoch * self.blocks + first) * (self.block_tokens // seq_length)


class Streams:
    """The streams of several sources at one sequence length, looked up together.

    Args:
        sources: those that are looked up have at least one block of `seq_length` tokens.
        seq_length: tokens of a window.
        seed: of the run.
    """

    def __init__(self, sources: Sequence[PlannedSource], seq_length: int, seed: int) -> None:
        def column(values: Sequence[int]) -> NDArray[np.uint64]:
            return np.array(values, dtype=np.uint64)

        self._seq_length = column([seq_length])
        self._begin = column([source.begin for source in sources])
        self._block_tokens = column([source.block_tokens for source in sources])
        self._windows = column([source.block_tokens // seq_length for source in sources])
        self._blocks = column([source.blocks for source in sources])
        self._region_blocks = column([source.region_blocks for source in sources])
        self._group = column([source.group_blocks(seq_length) for source in sources])
        self._key = column([_source_key(source.name, seed) for source in sources])

    def locate(self, sources: NDArray[np.int64], windows: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Where windows begin: the token's number within its source, for each pair of a source's
        number `[n]` and the number of a window in its stream `[n]`."""
        blocks, per_block = self._blocks[sources], self._windows[sources]
        epoch, in_epoch = np.divmod(windows, blocks * per_block)
        key = derive(self._key[sources], epoch)
        group_blocks = self._group[sources]
        group, place = np.divmod(in_epoch, group_blocks * per_block)
        first_block = group * group_blocks
        here = np.minimum(group_blocks, blocks - first_block) * per_block
        place = permute(place, here, derive(key, group))
        block = permute(first_block + place // per_block, blocks, key)
        region_blocks = self._region_blocks[sources]
        thinned = blocks < region_blocks
        if thinned.any():
            base = derive(self._key[sources], _BASE_ORDER)
            block[thinned] = permute(block, region_blocks, base)[thinned]
        in_region = block * self._block_tokens[sources] + place % per_block * self._seq_length
        return self._begin[sources] + in_region


def _source_key(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
