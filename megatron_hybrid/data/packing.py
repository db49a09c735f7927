"""Where documents begin and end in a micro-batch, without any dense mask.

A micro-batch of b samples of s tokens is flattened to one row of b*s. A document ends after its
EOD token, and every sample starts a new one; n is the number of documents in the row.
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
        loss_mask: `[1, b*s]` float32, 0 at EOD tokens: what follows is another document's.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    seq_idx: Tensor
    loss_mask: Tensor


def pack_documents(tokens: Tensor, eod: int) -> Packing:
    """Find the documents of `tokens` `[b, s]` (any integer type), which `eod` ends."""
    samples, seq_length = tokens.shape
    total = samples * seq_length
    is_end = tokens == eod
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
