"""The keyed permutation: a bijection at every size, well mixed, and the same for ever."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.data.permutation import MAX_SIZE, derive, permute

keys = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 3000), key=keys, rounds=st.integers(1, 8))
def test_it_is_a_bijection(size: int, key: int, rounds: int) -> None:
    """Every number below any size is the image of exactly one."""
    images = permute(np.arange(size), size, key, rounds=rounds)
    assert np.array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(2**20, MAX_SIZE), key=keys, data=st.data())
def test_large_sizes_stay_exact(size: int, key: int, data: st.DataObject) -> None:
    """Up to 2**40, distinct indices have distinct images below the size."""
    edges = {0, 1, size - 2, size - 1}
    indices = sorted(edges | data.draw(st.sets(st.integers(0, size - 1), max_size=200)))
    images = permute(indices, size, key)
    assert int(images.max()) < size
    assert len(set(images.tolist())) == len(indices)


@given(
    cases=st.lists(
        st.tuples(st.integers(1, 10**9), st.floats(0, 0.999), keys), min_size=1, max_size=20
    )
)
def test_sizes_and_keys_may_differ_along_an_array(cases: list[tuple[int, float, int]]) -> None:
    """A call over arrays of indices, sizes and keys is the same calls one by one."""
    index, size, key = zip(*((int(at * size), size, key) for size, at, key in cases), strict=True)
    together = permute(index, size, np.array(key, dtype=np.uint64))
    alone = [int(permute(*case)[0]) for case in zip(index, size, key, strict=True)]
    assert together.tolist() == alone


def _excess(counts: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean, for equally likely counts."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def _worst_excess(size: int, rounds: int) -> float:
    """Over the places of images, and over the distances between images of numbers that lie 1, a
    row, or half the size apart; of 64 permutations together."""
    buckets = 16
    row = size // math.ceil(math.sqrt(size))
    index = np.arange(size)
    places = np.zeros((buckets, buckets), dtype=np.int64)
    distances = {lag: np.zeros(buckets, dtype=np.int64) for lag in (1, row, row + 1, size // 2)}
    for key in range(64):
        images = permute(index, size, key, rounds=rounds).astype(np.int64)
        np.add.at(places, (index * buckets // size, images * buckets // size), 1)
        for lag, counts in distances.items():
            distance = (images[lag:] - images[:-lag]) % size
            counts += np.bincount(distance * buckets // size, minlength=buckets)
    return max(_excess(places.ravel()), *(_excess(counts) for counts in distances.values()))


@pytest.mark.parametrize("size", [1000, 4096, 10_007])
def test_it_is_well_mixed(size: int) -> None:
    """What we use, and 6 rounds, cannot be told from chance by a test that 2 rounds fail."""
    assert _worst_excess(size, rounds=2) > 100
    assert _worst_excess(size, rounds=6) < 5
    assert _worst_excess(size, rounds=8) < 5


def test_all_orders_of_few_numbers_are_as_likely() -> None:
    """Tiny sources are shuffled too: over keys, all 24 orders of 4 numbers come up alike."""
    count = 24_000
    key = derive(np.zeros(1, dtype=np.uint64), np.arange(count))
    images = np.stack([permute(index, 4, key) for index in range(4)])
    names = images.T.astype(np.int64) @ np.array([64, 16, 4, 1])
    _, counts = np.unique(names, return_counts=True)
    assert len(counts) == 24
    assert _excess(counts) < 5


def test_the_order_never_changes() -> None:
    """Runs in progress depend on these numbers: a change would repeat and skip their data."""
    assert permute(range(12), 12, 7).tolist() == [1, 3, 10, 9, 8, 0, 2, 7, 6, 11, 4, 5]
    assert permute([0, 1, 2**39], 2**40 - 1, 2**64 - 1).tolist() == [
        179970207785,
        107049302738,
        1072114531,
    ]
