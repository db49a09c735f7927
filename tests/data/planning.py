"""Sources, phases and checks that the tests of plans share."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megatron_hybrid.config.phases import Phase, normalised
from megatron_hybrid.data.layout import default_block_tokens
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.stream import PlannedSource, Position

SEQ_LENGTHS = (4, 6, 8, 12, 20, 32)

# A window as it is read: source, epoch, first token, tokens.
Window = tuple[str, int, int, int]


def source(name: str, tokens: int, block_tokens: int, **fields: Any) -> PlannedSource:
    """A source of one shard, all of it to draw from unless `fields` says otherwise."""
    values = {"shards": (f"{name}:{tokens}",), "begin": 0, "end": tokens} | fields
    return PlannedSource(name=name, tokens=tokens, block_tokens=block_tokens, **values)


@st.composite
def sources(draw: st.DrawFn, block_tokens: int, prefix: str = "s") -> list[PlannedSource]:
    """One to six sources: tiny or not, thinned or not, their regions anywhere."""
    drawn = []
    for number in range(draw(st.integers(1, 6))):
        blocks = draw(st.one_of(st.integers(1, 4), st.integers(1, 200)))
        begin = draw(st.integers(0, 50))
        end = begin + blocks * block_tokens + 1 + draw(st.integers(0, block_tokens - 1))
        fraction = draw(st.sampled_from([1.0, 1.0, 0.5, 0.1, 0.01]))
        tokens = end + draw(st.integers(0, 50))
        fields = {"begin": begin, "end": end, "fraction": fraction}
        drawn.append(source(f"{prefix}{number}", tokens, block_tokens, **fields))
    return drawn


@st.composite
def blends(draw: st.DrawFn, names: Sequence[str]) -> dict[str, float]:
    """Weights of some of the sources, over eight decades."""
    weight = st.one_of(st.just(0.0), st.floats(0.1, 1), st.floats(1e-8, 1))
    weights = draw(st.lists(weight, min_size=len(names), max_size=len(names)).filter(any))
    return normalised(dict(zip(names, weights, strict=True)))


@st.composite
def phases_from(
    draw: st.DrawFn, start_tokens: int, names: Sequence[str], room: int, lengths: Sequence[int]
) -> list[Phase]:
    """One to three phases, each with room for a global batch of `room` tokens."""
    drawn: list[Phase] = []
    for number in range(draw(st.integers(1, 3))):
        end = start_tokens + 2 * room + draw(st.integers(0, 1500))
        blend, length = draw(blends(names)), draw(st.sampled_from(lengths))
        drawn.append(Phase(f"p{start_tokens}-{number}", start_tokens, end, blend, length))
        start_tokens = end
    return drawn


@st.composite
def declarations(
    draw: st.DrawFn,
) -> tuple[list[Phase], list[PlannedSource], tuple[tuple[int, int], ...], int]:
    """The arguments of `make_plan` for runs of a few hundred samples."""
    lengths = draw(st.lists(st.sampled_from(SEQ_LENGTHS), min_size=1, max_size=3))
    block_tokens = draw(st.sampled_from([default_block_tokens(lengths), max(lengths), 77]))
    drawn = draw(sources(block_tokens))
    sizes = [(0, draw(st.integers(1, 7))), *draw(_size_changes)]
    room = max(size for _, size in sizes) * max(lengths)
    phases = draw(phases_from(0, [each.name for each in drawn], room, lengths))
    return phases, drawn, tuple(sizes), draw(st.integers(0, 2**32 - 1))


_size_changes = st.one_of(
    st.just([]), st.tuples(st.integers(1, 3000), st.integers(1, 7)).map(lambda pair: [pair])
)


def windows(plan: Plan, end_sample: int | None = None) -> list[Window]:
    """What the samples up to `end_sample` (all of them by default) read, in order."""
    end = plan.samples if end_sample is None else end_sample
    read = []
    positions: dict[str, Position] = {}
    for number, offset, length in zip(
        *(a.tolist() for a in plan.locate(np.arange(end))), strict=True
    ):
        drawn = plan.sources[number]
        window = drawn.resume(positions.get(drawn.name), length)
        positions[drawn.name] = Position(length, window + 1)
        read.append((drawn.name, window // drawn.epoch_windows(length), offset, length))
    return read


def check_no_repeats(read: Sequence[Window]) -> None:
    """No token is read twice in an epoch of its source (but as the label before a window)."""
    ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for name, epoch, offset, length in read:
        ranges.setdefault((name, epoch), []).append((offset, offset + length))
    for key, taken in ranges.items():
        taken.sort()
        for (_, end), (begin, _) in pairwise(taken):
            assert end <= begin, f"{key}: token {begin} is read twice"


def check_inside(plan: Plan, read: Sequence[Window]) -> None:
    """Every window and its last label lie in its source's region, in one of its blocks."""
    by_name = {each.name: each for each in plan.sources}
    for name, _, offset, length in read:
        drawn = by_name[name]
        assert drawn.begin <= offset
        assert offset + length + 1 <= drawn.end
        at = (offset - drawn.begin) % drawn.block_tokens
        assert at % length == 0
        assert at + length <= drawn.block_tokens
