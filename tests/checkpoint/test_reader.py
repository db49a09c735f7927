"""Rows of tensors that ranks have cut along any axes: read as the whole tensor has them."""

import random
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.reader import CheckpointReader, Chunk, TensorInfo, tensor_bytes

CASES = 400


class _InMemory(CheckpointReader):
    """A reader of one tensor whose chunks are in memory instead of in files."""

    def __init__(self, info: TensorInfo, chunks: dict[str, Tensor]) -> None:
        self.tensors = {info.name: info}  # type: ignore[assignment]
        self._chunks = chunks
        self.reads = 0

    def _open(self, info: TensorInfo, chunk: Chunk) -> Any:
        self._content = bytes(tensor_bytes(self._chunks[chunk.file]))
        return self

    def read_into(self, buffer: memoryview, start: int) -> None:
        self.reads += 1
        assert 0 <= start <= start + len(buffer) <= len(self._content)
        buffer[:] = self._content[start : start + len(buffer)]


def cut(whole: Tensor, edges: list[list[int]]) -> _InMemory:
    """A reader of `whole`, cut along each axis at its edges, which begin with 0 and the size."""
    chunks, contents = [], {}
    for place in product(*(list(pairwise(axis)) for axis in edges)):
        name = f"file {len(chunks)}"
        offsets = tuple(start for start, _ in place)
        sizes = tuple(stop - start for start, stop in place)
        chunks.append(Chunk(offsets, sizes, name, 0, 0))
        part = whole[tuple(slice(start, stop) for start, stop in place)]
        contents[name] = part.clone(memory_format=torch.contiguous_format)
    info = TensorInfo("t", tuple(whole.shape), whole.dtype, tuple(chunks))
    return _InMemory(info, contents)


@pytest.mark.parametrize("axes", [0, 1, 2, 3, 4])
def test_any_rows_of_any_cut(axes: int) -> None:
    """Random sizes and cuts along every axis, axes of one index too; every range of rows."""
    draws = random.Random(axes)
    for _ in range(CASES // 5):
        shape = [draws.choice([1, 2, 3, 4, 6]) for _ in range(axes)]
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
        edges = [
            sorted({0, size, *draws.sample(range(size + 1), draws.randint(0, min(size, 2)))})
            for size in shape
        ]
        reader = cut(whole, edges)
        rows, width = reader.tensors["t"].matrix
        for start in range(rows):
            stop = draws.randint(start + 1, rows)
            found = reader.read_rows("t", start, stop)
            assert torch.equal(found, whole.view(rows, width)[start:stop]), (shape, edges, start)


def test_rows_that_lie_together_are_one_read() -> None:
    """The weights of a convolution, [channels, 1, taps], cut among ranks: a read a part."""
    whole = torch.arange(4096 * 4, dtype=torch.int32).view(4096, 1, 4)
    reader = cut(whole, [[0, 2048, 4096], [0, 1], [0, 4]])
    assert torch.equal(reader.read_rows("t", 0, 4096), whole.view(4096, 4))
    assert reader.reads == 2
