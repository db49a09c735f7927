"""What the loader yields and the trainer consumes: one micro-batch.

Shapes: b samples of s tokens. Packed batches are one row, so there b = 1 and
s = micro_batch_size * seq_length; n is the number of documents in that row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of next-token prediction; tensors on the CPU, pinned when CUDA is there.

    Attributes:
        tokens: `[b, s]` int64.
        labels: `[b, s]` int64, the token after each.
        loss_mask: `[b, s]` float32; 0 where the label belongs to the next document, and in
            conversations where it is not to be learnt.
        position_ids: `[b, s]` int64; restarts with each document when packed.
        cu_seqlens: `[n + 1]` int32, from 0 to s: where documents start, or None: not packed.
        max_seqlen: tokens of the longest document, or None: not packed.
        seq_idx: `[1, s]` int32, the number of each token's document, or None: not packed.
        samples: numbers of its samples in the run, one after the other; None: not known.
        sources: of each of its samples, the number of the source among the run's; None: not known.
        offsets: of each, its first token among all of its source; with the source and its tokens it
            is what the sample is, in any plan. None: not known.
        phases: of each, the name of its phase in training; None: not known, or held out.
        extra: `[b, s]` each, by name: what an objective adds for itself.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    seq_idx: Tensor | None = None
    samples: tuple[int, ...] | None = None
    sources: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    phases: tuple[str, ...] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, which copies to a GPU without waiting need."""
        values = (getattr(self, field.name) for field in fields(self))
        pinned: list[Any] = [v.pin_memory() if isinstance(v, Tensor) else v for v in values]
        return Batch(*pinned)

    def after(self, count: int) -> "Batch":
        """The same rows with room for so many meta tokens in front, of which nothing is learnt.

        They are of the first document; every document's positions go on after them.
        """
        if not count:
            return self

        def room(tensor: Tensor) -> Tensor:
            return F.pad(tensor, (count, 0))

        positions = self.position_ids + count
        positions = F.pad(positions, (count, 0))
        positions[:, :count] = torch.arange(count)
        return replace(
            self,
            tokens=room(self.tokens),
            labels=room(self.labels),
            loss_mask=room(self.loss_mask),
            position_ids=positions,
            cu_seqlens=None if self.cu_seqlens is None else _later(self.cu_seqlens, count),
            max_seqlen=None if self.max_seqlen is None else self.max_seqlen + count,
            seq_idx=None if self.seq_idx is None else _longer_first(self.seq_idx, count),
            extra={name: room(tensor) for name, tensor in self.extra.items()},
        )


def _longer_first(seq_idx: Tensor, count: int) -> Tensor:
    return torch.cat((seq_idx[:, :1].expand(-1, count), seq_idx), dim=1)


def _later(cu_seqlens: Tensor, count: int) -> Tensor:
    later = cu_seqlens + count
    later[0] = 0
    return later
