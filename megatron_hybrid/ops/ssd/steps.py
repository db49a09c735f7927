"""Step sizes, decays and documents of a whole batch, cut into chunks.

Shapes: b batch, l tokens, N chunks of Q tokens, h heads, g groups; a block has K chunks, T = K * Q
tokens. The last chunk is filled up with steps of zero, which neither decay a state nor add to it.
These tensors have one number a token and head, a small part of what the blocks work on, so they are
made once for the whole sequence.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Below 2^-100 a decay is nothing, and exponentials of denormals are slow.
LOWEST_LOG2 = -100.0


class BlockShape(NamedTuple):
    """K chunks of Q tokens."""

    chunks: int
    tokens: int

    @property
    def all_tokens(self) -> int:
        return self.chunks * self.tokens


class BlockSteps(NamedTuple):
    """One block's views of the tensors of `Steps`, by token [T, h], by head [K, h, Q]."""

    dt: Tensor
    dt_to_end: Tensor
    from_start: Tensor
    to_end: Tensor
    dt_by_head: Tensor
    log2_decay: Tensor
    through: Tensor


class BlockGrads(NamedTuple):
    """One block's views of the tensors of `StepGrads`."""

    grad_y_x: Tensor
    grad_y_outer: Tensor
    x_grad_inner: Tensor
    x_grad_outer: Tensor
    own: Tensor
    pairs: Tensor
    state: Tensor


def _split_row(
    by_token: Sequence[Tensor], by_chunk: Sequence[Tensor], row: int, shapes: Sequence[BlockShape]
) -> list[list[Tensor]]:
    """For each block of a row its part of every tensor: [b, N*Q, ...] first, then [b, N, ...]."""
    tokens, chunks = [s.all_tokens for s in shapes], [s.chunks for s in shapes]
    parts = [t[row, : sum(tokens)].split(tokens) for t in by_token]
    parts += [t[row].split(chunks) for t in by_chunk]
    return [list(block) for block in zip(*parts, strict=True)]


class Steps:
    """What `dt`, `A` and the documents say about decays.

    Attributes (c: the computing dtype):
        dt: [b, N*Q, h] c. dt_by_head: [b, N, h, Q] c.
        log2_decay: [b, N, h, Q] float64: log2 of the decay from a chunk's start through a token.
        from_start: [b, N*Q, h] c: decay of the state before the chunk, seen by a token.
        to_end: [b, N*Q, h] c: decay of a token's input in the state after the chunk.
        dt_to_end: dt * to_end.
        through: [b, N, h] c: decay of a state through the whole chunk.
        documents: [b, N, Q] int32 or None.
    """

    def __init__(self, dt: Tensor, A: Tensor, documents: Tensor | None, chunk_tokens: int) -> None:
        batch, self.length, heads = dt.shape
        padding = -self.length % chunk_tokens
        self.dt = F.pad(dt, (0, 0, 0, padding))
        self.chunked = (batch, self.dt.shape[1] // chunk_tokens, chunk_tokens, heads)
        # float64: a float32 sum over a chunk costs its differences up to a factor of 100.
        log2 = self.dt.double() * (A.double() * math.log2(math.e))
        self.log2_decay = self.by_head(log2).contiguous().cumsum_(-1)
        from_start = self._decay(self.log2_decay)
        to_end = self._decay(self.log2_decay[..., -1:] - self.log2_decay)
        self.documents = None
        if documents is not None:
            last = documents[:, -1:].expand(batch, padding)
            self.documents = torch.cat([documents, last], dim=1).view(self.chunked[:3])
            # The document that the state before a chunk belongs to; the initial state is of the
            # first one.
            before = torch.cat([documents[:, :1], self.documents[:, :-1, -1]], dim=1)
            from_start *= (self.documents == before[..., None])[:, :, None]
            to_end *= (self.documents == self.documents[..., -1:])[:, :, None]
        self.through = from_start[..., -1].contiguous()
        self.from_start = from_start.transpose(2, 3).reshape(self.dt.shape)
        self.to_end = to_end.transpose(2, 3).reshape(self.dt.shape)
        self.dt_to_end = self.dt * self.to_end
        self.dt_by_head = self.by_head(self.dt).contiguous()

    def by_head(self, tensor: Tensor) -> Tensor:
        """[b, N*Q, h] as [b, N, h, Q], a view."""
        return tensor.view(self.chunked).transpose(2, 3)

    def of_blocks(self, row: int, shapes: Sequence[BlockShape]) -> list[BlockSteps]:
        """The views of every block of a row."""
        by_token = (self.dt, self.dt_to_end, self.from_start, self.to_end)
        by_chunk = (self.dt_by_head, self.log2_decay, self.through)
        blocks = [BlockSteps(*part) for part in _split_row(by_token, by_chunk, row, shapes)]
        last, tokens = blocks[-1], shapes[-1].tokens
        blocks[-1] = last._replace(
            dt_by_head=last.dt_by_head[..., :tokens], log2_decay=last.log2_decay[..., :tokens]
        )
        return blocks

    def _decay(self, log2: Tensor) -> Tensor:
        return log2.clamp(LOWEST_LOG2, 0.0).to(self.dt.dtype).exp2_()


class StepGrads:
    """What the blocks of a backward pass leave for the gradients of dt, A and D.

    Zero after the last token; [b, N*Q, h] and sums over p of products, where nothing else is said.
        grad_y_x: grad_y * x.
        grad_y_outer: grad_y * (y from the state before the chunk, not yet decayed).
        x_grad_inner: x * (gradient of dt * x from later tokens of the chunk).
        x_grad_outer: x * (gradient of dt * x from the state after the chunk, not yet decayed).
        own: [b, N*Q, g]: C * B of one token, summed over n.
        pairs: [b, N, h, Q] float64: what y and its gradient make of the pairs of two tokens of a
            chunk, summed over the pairs that end with a token, less those that begin with it.
        state: [b, N, h]: (state before the chunk) * (its gradient from the state after it).
    """

    def __init__(self, steps: Steps, groups: int) -> None:
        self.steps = steps
        self.grad_y_x, self.grad_y_outer, self.x_grad_inner, self.x_grad_outer = (
            torch.zeros_like(steps.dt) for _ in range(4)
        )
        self.own = steps.dt.new_zeros(*steps.dt.shape[:2], groups)
        self.pairs = torch.zeros_like(steps.dt_by_head, dtype=torch.float64)
        self.state = torch.zeros_like(steps.through)

    def of_blocks(self, row: int, shapes: Sequence[BlockShape]) -> list[BlockGrads]:
        """The views of every block of a row."""
        by_token = (
            self.grad_y_x, self.grad_y_outer, self.x_grad_inner, self.x_grad_outer, self.own,
        )  # fmt: skip
        by_chunk = (self.pairs, self.state)
        blocks = [BlockGrads(*part) for part in _split_row(by_token, by_chunk, row, shapes)]
        blocks[-1] = blocks[-1]._replace(pairs=blocks[-1].pairs[..., : shapes[-1].tokens])
        return blocks

    def finish(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of dt [b, l, h] in its dtype, and of A [h] and D [h] in float64.

        The gradient of a token's log decay sums over pairs of a token before it and one not before
        it. Adding up `pairs` from a token to the end of its chunk leaves these: the others are in
        it twice, with both signs, and are most of it. Hence float64, in which they cancel; float32
        sums would leave their rounding, ten times that of what is left. A token's product with
        itself is in no such pair and is kept apart from the start.
        """
        steps = self.steps
        x_grad_outer = self.x_grad_outer.mul_(steps.to_end)
        grad_y_outer = self.grad_y_outer.mul_(steps.from_start)
        dt = steps.dt_by_head.double()
        later = self.pairs.add_(steps.by_head(grad_y_outer))
        earlier = dt * steps.by_head(x_grad_outer)
        grad_log = later.flip(-1).cumsum(-1).flip(-1)
        grad_log += earlier.cumsum(-1) - earlier
        grad_log += self.state[..., None]
        grad_A = (dt * grad_log).sum((0, 1, 3))
        grad_dt = (grad_log * A.double()[:, None]).transpose(2, 3).reshape(steps.dt.shape)
        own = self.own.repeat_interleave(steps.chunked[-1] // self.own.shape[-1], dim=-1)
        grad_dt += own * self.grad_y_x + self.x_grad_inner + x_grad_outer
        grad_D = self.grad_y_x.sum((0, 1), dtype=torch.float64)
        return grad_dt[:, : steps.length].to(steps.dt.dtype), grad_A, grad_D
