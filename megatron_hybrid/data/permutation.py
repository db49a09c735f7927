"""A keyed permutation of `[0, size)` that is computed, never stored.

A Feistel network over a grid of rows x columns that just holds `size` cells: in turn, the row moves
by a random amount that the column decides, and the column by one that the row decides. Each round
can be undone, so the network is a bijection of the grid; an image outside `[0, size)` is sent
through again until it lies inside ("cycle-walking", Black and Rogaway 2002), which is a bijection
of `[0, size)`. The grid has fewer than `rows` cells too many, so hardly any index walks.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SIZE = 2**40
ROUNDS = 8  # 2 are not random (the test suite shows it), 6 would do

_U32 = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)


def permute(
    index: ArrayLike, size: ArrayLike, key: ArrayLike, *, rounds: int = ROUNDS
) -> NDArray[np.uint64]:
    """The images of `index` under the permutation of `[0, size)` that `key` names.

    Args:
        index: below `size`; `index`, `size` and `key` are broadcast against each other.
        size: from 1 to `MAX_SIZE`.
        key: any uint64.
        rounds: of the network.

    Returns:
        uint64 of the broadcast shape (at least one-dimensional), below `size`.
    """
    index, size, key = (
        array.copy()
        for array in np.broadcast_arrays(
            *(np.atleast_1d(np.asarray(each, dtype=np.uint64)) for each in (index, size, key))
        )
    )
    assert (index < size).all() and (size <= MAX_SIZE).all()
    image = _feistel(index, size, key, rounds)
    outside = np.nonzero(image >= size)
    while outside[0].size:
        image[outside] = _feistel(image[outside], size[outside], key[outside], rounds)
        outside = tuple(axis[image[outside] >= size[outside]] for axis in outside)
    return image


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): every bit of an array's numbers depends
    on all bits of theirs; a bijection."""
    value = (value ^ (value >> np.uint64(30))) * _FACTOR_1
    value = (value ^ (value >> np.uint64(27))) * _FACTOR_2
    return value ^ (value >> np.uint64(31))


def derive(key: NDArray[np.uint64], number: ArrayLike) -> NDArray[np.uint64]:
    """Keys of their own for each `number` under each `key`, broadcast."""
    # Arrays wrap around in silence, single numbers of numpy with a warning.
    return mix(key + _GOLDEN * (np.atleast_1d(np.asarray(number, np.uint64)) + np.uint64(1)))


def _feistel(
    index: NDArray[np.uint64], size: NDArray[np.uint64], key: NDArray[np.uint64], rounds: int
) -> NDArray[np.uint64]:
    rows = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.uint64)
    columns = (size + rows - np.uint64(1)) // rows
    row, column = np.divmod(index, columns)
    for number in range(rounds):
        round_key = derive(key, number)
        if number % 2 == 0:
            row = _add(row, _random_below(rows, column ^ round_key), rows)
        else:
            column = _add(column, _random_below(columns, row ^ round_key), columns)
    return row * columns + column


def _random_below(bound: NDArray[np.uint64], value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A number below `bound` (at most 2**32) for each value."""
    value = value * _FACTOR_1
    value = (value ^ (value >> _U32)) * _FACTOR_2
    return ((value >> _U32) * bound) >> _U32


def _add(
    term: NDArray[np.uint64], other: NDArray[np.uint64], modulus: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """`(term + other) % modulus` of numbers below it: a difference below 0 wraps to a huge one."""
    total = term + other
    return np.minimum(total, total - modulus)
