"""The stream of one source: every window once an epoch, and nothing twice where lengths change."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.data.stream import PlannedSource, Position, Streams
from tests.data.planning import SEQ_LENGTHS, source

fractions = st.sampled_from([1.0, 0.7, 0.1, 0.003])


def _offsets(
    drawn: PlannedSource, seq_length: int, windows: Sequence[int], seed: int = 1
) -> list[int]:
    numbers = np.array(windows, dtype=np.uint64)
    streams = Streams([drawn], seq_length, seed)
    return streams.locate(np.zeros(len(windows), dtype=np.int64), numbers).tolist()


@given(
    tokens=st.integers(100, 5000),
    seq_length=st.sampled_from(SEQ_LENGTHS),
    block_tokens=st.sampled_from([32, 48, 64, 77]),
    fraction=fractions,
    epoch=st.integers(0, 3),
)
def test_an_epoch_reads_each_window_once(
    tokens: int, seq_length: int, block_tokens: int, fraction: float, epoch: int
) -> None:
    """An epoch is the windows of all blocks; with a fraction, of as many blocks, and the same ones
    in each epoch and at each sequence length."""
    drawn = source("web", tokens, block_tokens, begin=10, fraction=fraction)
    count = drawn.epoch_windows(seq_length)
    read = _offsets(drawn, seq_length, range(epoch * count, (epoch + 1) * count))
    blocks = {(offset - 10) // block_tokens for offset in read}
    assert len(blocks) == drawn.blocks
    assert sorted(read) == sorted(
        10 + block * block_tokens + at
        for block in blocks
        for at in range(0, block_tokens // seq_length * seq_length, seq_length)
    )
    first = _offsets(drawn, 8, range(drawn.epoch_windows(8)))
    assert blocks == {(offset - 10) // block_tokens for offset in first}


def test_a_fraction_is_of_blocks_and_exact() -> None:
    """A tenth of ten blocks is one, of eleven two; a source never vanishes."""
    for blocks, fraction, kept in [(10, 0.1, 1), (11, 0.1, 2), (10, 0.3, 3), (10, 1e-5, 1)]:
        assert source("web", blocks * 32 + 1, 32, fraction=fraction).blocks == kept


def test_what_the_order_depends_on() -> None:
    """Another epoch, seed or name gives another order; other sources and tokens elsewhere don't."""
    drawn = source("web", 64 * 32 + 1, 32)
    orders = [
        _offsets(drawn, 32, range(64)),
        _offsets(drawn, 32, range(64, 128)),
        _offsets(drawn, 32, range(64), seed=2),
        _offsets(source("code", 64 * 32 + 1, 32), 32, range(64)),
    ]
    assert len(set(map(tuple, orders))) == len(orders)
    beside = Streams([source("code", 9999, 32), drawn], 32, seed=1)
    same = beside.locate(np.ones(64, dtype=np.int64), np.arange(64, dtype=np.uint64))
    assert same.tolist() == orders[0]


def test_neighbours_are_parted() -> None:
    """Where blocks hold several windows, those of a block do not follow each other."""
    drawn = source("web", 64 * 64 * 32 + 1, 32)
    read = np.array(_offsets(drawn, 8, range(drawn.epoch_windows(8))))
    follow = np.mean(np.diff(read) == 8)
    assert follow < 0.01


@given(
    blocks=st.integers(1, 300),
    first=st.sampled_from(SEQ_LENGTHS),
    second=st.sampled_from(SEQ_LENGTHS),
    share=st.floats(0, 3),
    block_tokens=st.sampled_from([32, 48, 64, 77]),
)
def test_a_change_of_length_repeats_nothing_and_skips_little(
    blocks: int, first: int, second: int, share: float, block_tokens: int
) -> None:
    """After any number of windows, the rest of the epoch at another length is unread text, and at
    most a 64th of the source, or one block, has been left out for it."""
    drawn = source("web", blocks * block_tokens + 1, block_tokens)
    windows = int(share * drawn.epoch_windows(first))
    start = drawn.resume(Position(first, windows), second)
    epoch = windows // drawn.epoch_windows(first)
    begin = epoch * drawn.epoch_windows(first)
    read = _offsets(drawn, first, range(begin, windows))
    here = range(start, (epoch + 1) * drawn.epoch_windows(second))
    then = _offsets(drawn, second, here)
    tokens = [offset + at for offset in read for at in range(first)]
    tokens += [offset + at for offset in then for at in range(second)]
    assert len(tokens) == len(set(tokens))
    if first == second:
        assert start == windows
    else:
        left_out = drawn.epochs(Position(second, start)) - drawn.epochs(Position(first, windows))
        assert 0 <= left_out * blocks <= 2 * max(1, blocks // 64)


def test_a_source_that_was_not_read_begins_at_its_beginning() -> None:
    """No position is no epoch, and window 0."""
    drawn = source("web", 1000, 32)
    assert drawn.resume(None, 8) == 0
    assert drawn.epochs(None) == 0
