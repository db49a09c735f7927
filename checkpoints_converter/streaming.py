"""Move rows from files to files in blocks: memory is a few blocks per thread, whatever the model.

A block is a run of rows of one tensor that is being made. Threads take blocks in their order, read
what they are made of, and write them.
"""

import functools
from collections.abc import Iterator, Mapping
from math import inf, isnan
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.weights import Recipe, Spec
from megatron_hybrid.checkpoint.reader import as_matrix

# Small enough to be read, summed and written within a processor's cache.
BLOCK_BYTES = 1 << 20


class RowSource(Protocol):
    """What blocks are read from."""

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as a matrix: `[stop - start, width]`."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Block(NamedTuple):
    """Rows `start` to `stop` of the tensor that a recipe makes."""

    recipe: Recipe
    start: int
    stop: int


def blocks(whole: Block, max_bytes: int, itemsize: int, align: int = 1) -> Iterator[Block]:
    """The rows of a block in blocks of about `max_bytes`.

    Args:
        itemsize: bytes of an element.
        align: each begins at a multiple of so many rows.
    """
    width = as_matrix(whole.recipe.spec.shape)[1]
    step = max(1, max_bytes // max(1, width * itemsize * align)) * align
    for start in range(whole.start, whole.stop, step):
        yield Block(whole.recipe, start, min(start + step, whole.stop))


def whole(recipe: Recipe) -> Block:
    """All rows of a tensor."""
    return Block(recipe, 0, as_matrix(recipe.spec.shape)[0])


def make_rows(block: Block, dtype: torch.dtype, source: RowSource) -> Tensor:
    """The rows of a block: `[stop - start, width]` of `dtype`; where no piece lies, zeros.

    Raises:
        ConversionError: a value is no number, is infinite where no model can use it, or is beyond
            the range of `dtype`.
    """
    recipe, start, stop = block
    parts = []
    done = start
    for piece in recipe.pieces:
        low, high = max(piece.row, start), min(piece.row + piece.count, stop)
        if low < high:
            first = piece.source_row + low - piece.row
            rows = source.read_rows(piece.source, first, first + high - low)
            _refuse_no_numbers(rows, recipe.spec, piece.source)
            parts.append(_cast(rows, dtype, recipe.spec.name))
            done = high
    if done < stop:
        parts.append(torch.zeros(stop - done, as_matrix(recipe.spec.shape)[1], dtype=dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _refuse_no_numbers(rows: Tensor, spec: Spec, source: str) -> None:
    """NaN and infinity are no weights; but a decay or a bias of -inf stands for never."""
    if not rows.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(rows))  # both are NaN where one is
    if isnan(low) or high == inf or (low == -inf and not spec.fp32):
        raise ConversionError(
            f"{source} holds {high if high == inf else low}: of such a model nothing can be "
            "computed, and it is not converted"
        )


def _cast(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if rows.dtype == dtype:
        return rows
    cast = rows.to(dtype)
    if (cast.isinf() & ~rows.isinf()).any():
        largest = rows[~rows.isinf()].abs().max().item()
        raise ConversionError(f"{name} holds {largest:g}, which is beyond the range of {dtype}")
    return cast


def stored_dtype(
    recipe: Recipe, sources: Mapping[str, torch.dtype], asked: torch.dtype | None
) -> torch.dtype:
    """What a tensor is written as: the dtype it has, or the one that was asked for.

    What decides about decay and routing (`Spec.fp32`) is not cast below fp32.
    """
    found = [sources[piece.source] for piece in recipe.pieces] or [torch.float32]
    own = functools.reduce(torch.promote_types, found)
    if asked is None:
        return own
    return torch.promote_types(own, torch.float32) if recipe.spec.fp32 else asked
