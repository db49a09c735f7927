"""Where documents begin and end in a micro-batch, without any dense mask.

A micro-batch of b samples of s tokens is flattened to one row of b*s. A document ends after its
end token, or where the index of its file says so, and every sample starts a new one; n is the
number of documents in the row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The documents of one row of `b*s` tokens.

    Attributes:
        cu_seqlens: `[n + 1]` int32, ascending from 0 to `b*s`.
        max_seqlen: tokens of the longest document.
        position_ids: `[1, b*s]` int64, from 0 in each document.
        seq_idx: `[1, b*s]` int32, the document's number, from 0.
        loss_mask: `[1, b*s]` float32, 0 at the last token of a document: what follows is
            another document's.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    seq_idx: Tensor
    loss_mask: Tensor


def pack_documents(is_end: Tensor) -> Packing:
    """Lay out the documents of b samples.

    Args:
        is_end: `[b, s]` bool, whether a token is the last of its document.
    """
    samples, seq_length = is_end.shape
    total = samples * seq_length
    ends_here = is_end.clone()
    ends_here[:, -1] = True
    ends = ends_here.view(-1).nonzero().view(-1) + 1
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=total)
    seq_idx = torch.repeat_interleave(lengths, output_size=total)
    return Packing(
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=int(lengths.max()),
        position_ids=(torch.arange(total) - starts).view(1, total),
        seq_idx=seq_idx.int().view(1, total),
        loss_mask=(~is_end).view(1, total).float(),
    )
