"""Blends without a list: exact counts, exact ranks, even spacing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.data.proportions import MAX_SLOTS, Proportions, share_out

small_counts = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any)


@given(counts=small_counts)
def test_every_slot_has_one_source_and_the_next_rank(counts: list[int]) -> None:
    """Walking through the slots, each source counts 0, 1, 2 … up to its exact number."""
    proportions = Proportions(counts)
    sources, ranks = proportions.locate(np.arange(sum(counts)))
    for source, count in enumerate(counts):
        assert ranks[sources == source].tolist() == list(range(count))


@given(counts=small_counts, data=st.data())
def test_counts_before_a_slot_equal_counting(counts: list[int], data: st.DataObject) -> None:
    """The closed form of the counts is what counting the slots gives."""
    proportions = Proportions(counts)
    slot = data.draw(st.integers(0, sum(counts)))
    sources, _ = proportions.locate(np.arange(slot))
    assert proportions.before(slot) == np.bincount(sources, minlength=len(counts)).tolist()


@given(
    counts=st.lists(
        st.one_of(st.integers(0, 9), st.integers(0, MAX_SLOTS // 30)), min_size=1, max_size=30
    ).filter(any),
    data=st.data(),
)
def test_it_is_exact_in_64_bits(counts: list[int], data: st.DataObject) -> None:
    """Up to 2**40 slots the vectorised lookup agrees with whole numbers of any size."""
    proportions = Proportions(counts)
    slot = data.draw(st.integers(0, sum(counts) - 1))
    (source,), (rank,) = proportions.locate([slot])
    before, after = proportions.before(slot), proportions.before(slot + 1)
    assert [late - early for early, late in zip(before, after, strict=True)] == [
        int(number == source) for number in range(len(counts))
    ]
    assert before[source] == rank
    assert proportions.before(sum(counts)) == counts


def _largest_deviation(counts: list[int]) -> float:
    total = sum(counts)
    sources, _ = Proportions(counts).locate(np.arange(total))
    seen = np.cumsum(sources[:, None] == np.arange(len(counts)), axis=0)
    due = np.arange(1, total + 1)[:, None] * np.array(counts) / total
    return float(np.abs(seen - due).max())


@given(weights=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=40), total=st.integers(1, 3000))
def test_no_prefix_strays_from_the_weights(weights: list[float], total: int) -> None:
    """Whatever the weights, after any number of slots each source is within 2 slots of its due."""
    assert _largest_deviation(share_out(weights, total)) <= 2


def test_200_sources_are_spread_evenly() -> None:
    """200 sources of weights over four decades: every prefix within 1.5 slots of its due."""
    weights = np.exp(np.random.default_rng(0).uniform(np.log(1e-4), 0, 200))
    assert _largest_deviation(share_out(weights.tolist(), 20_000)) <= 1.5


@given(
    weights=st.lists(
        st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=50
    ).filter(any),
    total=st.integers(0, MAX_SLOTS),
)
def test_sharing_out_is_exact(weights: list[float], total: int) -> None:
    """Shares sum to the total, lie within 1 of the weights, and nothing has none."""
    counts = share_out(weights, total)
    assert sum(counts) == total
    scale = total / sum(weights)
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight * scale) < 1 + total * 1e-12
        assert weight or not count
