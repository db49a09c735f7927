"""CRC-32 of bytes that are read in any order, by several threads: put together at the end."""

import zlib
from collections.abc import Callable
from functools import cache

_POLYNOMIAL = 0xEDB88320  # CRC-32 of zip files, least significant bit first


def _times(matrix: list[int], vector: int) -> int:
    """Matrix times vector over GF(2); column i of the matrix answers bit i of the vector."""
    product = 0
    for column in matrix:
        if vector & 1:
            product ^= column
        vector >>= 1
    return product


@cache
def _zeros(power: int) -> list[int]:
    """What appending 2**power zero bytes does to a CRC, as a matrix."""
    if power == 0:
        matrix = [_POLYNOMIAL, *(1 << bit for bit in range(31))]  # one zero bit
        for _ in range(3):
            matrix = [_times(matrix, column) for column in matrix]
        return matrix
    half = _zeros(power - 1)
    return [_times(half, column) for column in half]


def combine(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two byte strings, one after the other, from the CRC-32 of each.

    Appending zero bytes is linear in the CRC over GF(2) (zlib's crc32_combine, which Python's zlib
    does not offer).
    """
    for power in range(second_bytes.bit_length()):
        if second_bytes >> power & 1:
            first = _times(_zeros(power), first)
    return first ^ second


def whole_crc(
    blocks: list[tuple[int, int, int]], size: int, read: Callable[[int, int], bytes]
) -> int:
    """The CRC-32 of `size` bytes of which blocks were read; what was left out is read now.

    Args:
        blocks: (first byte, number of bytes, CRC-32) of each, in any order; they may overlap.
        size: of the whole, in bytes.
        read: gives bytes by (first byte, number of bytes).
    """
    crc = done = 0
    for start, length, block_crc in [*sorted(blocks), (size, 0, 0)]:
        if start < done:
            continue  # read twice; what it has beyond `done` is read again
        crc, done = _extend(crc, done, start, read), start
        crc, done = combine(crc, block_crc, length), start + length
    return crc


def _extend(crc: int, start: int, end: int, read: Callable[[int, int], bytes]) -> int:
    step = 1 << 24
    for place in range(start, end, step):
        crc = zlib.crc32(read(place, min(step, end - place)), crc)
    return crc
