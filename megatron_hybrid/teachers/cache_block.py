"""A file of cached answers: some samples of one length, each with a checksum of its own.

Bytes: a row a sample, one after the other; then the table, of little-endian numbers: where each row
ends (uint64), its CRC-32 (uint32); then what all rows are of (the digest of `cache.json`, and part,
block number and number of samples), the CRC-32 of table and this, and eight letters.

A row: with `top_p`, how many are kept of each token (uint32, s of them); of all that are kept,
token by token, the likeliest first: the low 16 bits of the ids; a plane for each higher bit, eight
ids a byte; the logits. Then of each token (fp32, s each): the log of the sum over the vocabulary,
the log-probability of the tail, and the teacher's loss.

Legend: s tokens of a sample, k kept of each at most, n kept of all.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.part_file import PartFile
from megatron_hybrid.teachers.cache_spec import Block, CacheError, CacheSpec

_LETTERS = b"MHANSWER"
_END = struct.Struct("<32sBQQI8s")
_PARTS = {"train": 0, "valid": 1}


@dataclass(frozen=True)
class Answers:
    """Of one sample.

    Attributes:
        ids: `[s, k]` int64, -1: none.
        values: `[s, k]` their logits: fp32, or the bits of bf16 as uint16.
        log_sum, log_tail, loss: `[s]` fp32.
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float32] | NDArray[np.uint16]
    log_sum: NDArray[np.float32]
    log_tail: NDArray[np.float32]
    loss: NDArray[np.float32]


def encode(answers: Answers, spec: CacheSpec) -> bytes:
    """A row."""
    there = answers.ids >= 0
    ids = answers.ids[there].astype(np.uint32)
    counts = [] if spec.top_p is None else [there.sum(1).astype("<u4")]
    planes = [
        np.packbits((ids >> (16 + bit)).astype(np.uint8) & 1) for bit in range(spec.id_planes)
    ]
    values = answers.values[there].astype("<u2" if spec.dtype == "bf16" else "<f4")
    tokens = [each.astype("<f4") for each in (answers.log_sum, answers.log_tail, answers.loss)]
    parts = [*counts, (ids & 0xFFFF).astype("<u2"), *planes, values, *tokens]
    return b"".join(each.tobytes() for each in parts)


def decode(row: memoryview, spec: CacheSpec, seq_length: int) -> Answers:
    """What `encode` made a row of."""
    taken = 0

    def take(dtype: str, count: int) -> NDArray[Any]:
        nonlocal taken
        found = np.frombuffer(row, dtype, count, taken)
        taken += found.nbytes
        return found

    shape, kept = (seq_length, spec.top_k), seq_length * spec.top_k
    there = None
    if spec.top_p is not None:
        counts = take("<u4", seq_length)
        there = np.arange(spec.top_k) < counts[:, None]
        kept = int(counts.sum())
    ids = take("<u2", kept).astype(np.int64)
    for bit in range(spec.id_planes):
        plane = np.unpackbits(take("u1", -(-kept // 8)), count=kept)
        ids |= plane.astype(np.int64) << (16 + bit)
    values = take("<u2" if spec.dtype == "bf16" else "<f4", kept)
    tokens = [take("<f4", seq_length) for _ in range(3)]
    if there is None:
        whole = ids.reshape(shape), values.reshape(shape)
    else:
        whole = np.full(shape, -1, np.int64), np.zeros(shape, values.dtype)
        whole[0][there], whole[1][there] = ids, values
    return Answers(*whole, *tokens)


class BlockWriter:
    """A block's file, a row after the other; it appears whole or not at all."""

    def __init__(self, path: Path, digest: bytes, block: Block) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = PartFile(path)
        self._digest, self._block = digest, block
        self._ends: list[int] = []
        self._crcs: list[int] = []

    def add(self, row: bytes) -> None:
        """The next sample's."""
        self._file.write(row)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(row))
        self._crcs.append(zlib.crc32(row))

    def publish(self) -> None:
        """After the last row."""
        block = self._block
        count = len(self._ends)
        assert count == block.end_sample - block.first_sample
        table = np.array(self._ends, "<u8").tobytes() + np.array(self._crcs, "<u4").tobytes()
        end = _END.pack(self._digest, _PARTS[block.part], block.number, count, 0, _LETTERS)
        crc = zlib.crc32(table + end)
        self._file.write(
            table + _END.pack(self._digest, _PARTS[block.part], block.number, count, crc, _LETTERS)
        )
        self._file.sync()
        self._file.publish()

    def discard(self) -> None:
        """Leave nothing behind; does nothing after `publish`."""
        self._file.discard()


class BlockReader:
    """A block's file, mapped into memory; rows are held against their checksums as they are read.

    Raises:
        CacheError: the file is not there, is damaged, or is of another cache or block.
    """

    def __init__(self, path: Path, digest: bytes, block: Block) -> None:
        self.path, self._block = path, block
        count = block.end_sample - block.first_sample
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be read: {error}") from error
        table = 12 * count
        rows = len(self._bytes) - table - _END.size
        if rows < 0:
            raise CacheError(f"{path} is damaged: it has {len(self._bytes)} bytes")
        tail = self._bytes[rows:].tobytes()
        its, part, number, size, crc, letters = _END.unpack(tail[table:])
        whole = tail[:table] + _END.pack(its, part, number, size, 0, letters)
        if letters != _LETTERS or zlib.crc32(whole) != crc:
            raise CacheError(f"{path} is damaged: its table does not fit its checksum")
        if (its, part, number, size) != (digest, _PARTS[block.part], block.number, count):
            raise CacheError(f"{path} is of another cache, or another block of it")
        self._ends = np.frombuffer(tail, "<u8", count).astype(np.int64)
        self._crcs = np.frombuffer(tail, "<u4", count, 8 * count)
        if count and self._ends[-1] != rows:
            raise CacheError(f"{path} is damaged: rows end at {self._ends[-1]}, not at {rows}")

    def read(self, sample: int, spec: CacheSpec) -> Answers:
        """A sample's, by its number in the plan of the block's part.

        Raises:
            CacheError: its bytes do not fit their checksum.
        """
        number = sample - self._block.first_sample
        start = int(self._ends[number - 1]) if number else 0
        row = memoryview(self._bytes[start : int(self._ends[number])])
        if zlib.crc32(row) != self._crcs[number]:
            raise CacheError(
                f"{self.path} is damaged: the answers to sample {sample} of {self._block.part} "
                "do not fit their checksum; remove the file, and `megatron-hybrid distill cache` "
                "makes it again"
            )
        return decode(row, spec, self._block.seq_length)
