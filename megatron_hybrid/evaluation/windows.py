"""Documents cut into rows that a forward pass takes, so that each token is counted once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from megatron_hybrid.data.batch import Batch

NOWHERE = -1
INTO = "into"  # of `Batch.extra`: [b, s], the number of each label's sum, or NOWHERE


@dataclass(frozen=True, eq=False)
class Row:
    """A window of a document.

    Attributes:
        tokens: `[n + 1]` int64: each is the label of the one before it.
        counted_from: the first of its n labels that is counted.
        into: `[n - counted_from]` int64, the number of the sum of each that is.
    """

    tokens: NDArray[np.int64]
    counted_from: int
    into: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens) - 1


def rows_of(
    tokens: ArrayLike, seq_length: int, overlap: int, into: int | Sequence[int]
) -> Iterator[Row]:
    """The windows of a document: every token but the first is counted in one of them.

    A window has `seq_length` tokens before its last label, of which it shares `overlap` with the
    one before it; those are context there, and not counted again.

    Args:
        overlap: less than `seq_length`.
        into: the sum of all its tokens, or that of each but the first.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    labels = len(ids) - 1
    if labels < 1:
        return
    sums = np.full(labels, into) if isinstance(into, int) else np.asarray(into, dtype=np.int64)
    done = 0
    while done < labels:
        begin = max(0, done - overlap)
        end = min(begin + seq_length, labels)
        yield Row(ids[begin : end + 1], done - begin, sums[done:end])
        done = end


def padded(rows: Sequence[Row], count: int, length: int) -> Batch:
    """A micro batch `[count, length]` of rows, filled up with what is not counted."""
    tokens = torch.zeros(count, length + 1, dtype=torch.int64)
    into = torch.full((count, length), NOWHERE, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row) + 1] = torch.from_numpy(row.tokens)
        into[number, row.counted_from : len(row)] = torch.from_numpy(row.into)
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=(into != NOWHERE).float(),
        position_ids=torch.arange(length).repeat(count, 1),
        extra={INTO: into},
    )


def counted_into(batch: Batch, sums: Sequence[int]) -> Batch:
    """A batch of the loader whose labels go where their samples do, as far as its mask has them.

    Args:
        sums: of each sample of the batch, the number of its sum.
    """
    of_row = torch.tensor(sums)[:, None].expand(len(sums), batch.tokens.numel() // len(sums))
    into = of_row.reshape(batch.tokens.shape).clone()
    into[batch.loss_mask == 0] = NOWHERE
    return Batch(**{**vars(batch), "extra": {INTO: into}})
