"""SSD over one block of chunks, forward and backward, as batched GEMMs in reused workspaces.

Shapes: K chunks of Q tokens are a block of T = K * Q tokens; h heads of p channels in g groups of
r = h / g; n state. A block is small enough for its workspaces to stay in the cache. Every GEMM runs
without copies, and B and C are never expanded over the heads of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.ops.ssd.buffers import Buffers, DTypes, Sizes
from megatron_hybrid.ops.ssd.steps import (
    LOWEST_LOG2,
    BlockGrads,
    BlockShape,
    BlockSteps,
    StepGrads,
    Steps,
)

# Both measured: half and twice as much are slower.
CHUNK_TOKENS = 64
BLOCK_ELEMENTS_A_THREAD = 128 * 1024  # of x in a block


@dataclass(frozen=True)
class Block:
    """One block: where it is in its row, its part of `Steps`, its workspaces.

    `mask` is 1 where token j comes before token i of the same document: [Q, Q] or [K, 1, Q, Q].
    """

    row: int
    tokens: slice
    chunks: slice
    shape: BlockShape
    steps: BlockSteps
    buffers: Buffers
    mask: Tensor


def copy_if_other(out: Tensor, tensor: Tensor) -> Tensor:
    """`out`, with `tensor` copied into it unless `out` is just a name for it (see `Buffers`)."""
    return out if out.dtype == tensor.dtype else out.copy_(tensor)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, scratch: Tensor) -> None:
    """out = a * b; through `scratch` if `out` has another dtype.

    `torch.mul` with such an `out` allocates a temporary, and faulting it in takes longer than the
    product.
    """
    if out.dtype == scratch.dtype:
        torch.mul(a, b, out=out)
    else:
        out.copy_(torch.mul(a, b, out=scratch))


class BlockScan:
    """Runs blocks: `scan` for y and states, then, for the gradients of the same block, `backward`.

    Args:
        sizes: of the tensors.
        dt: [b, l, h], computing dtype, positive.
        A: [h], negative.
        D: skip [h].
        documents: [b, l] int32 or None.
        dtypes: of computing, of the GEMMs and of what is kept.
        shapes: of the blocks; None: as many chunks in a row as the cache holds.
    """

    def __init__(
        self,
        sizes: Sizes,
        dt: Tensor,
        A: Tensor,
        D: Tensor,
        documents: Tensor | None,
        dtypes: DTypes,
        shapes: list[BlockShape] | None = None,
    ) -> None:
        self.sizes, self.dtypes, self._length = sizes, dtypes, dt.shape[1]
        chunk = shapes[0].tokens if shapes else min(CHUNK_TOKENS, self._length)
        self.steps = Steps(dt, A, documents, chunk)
        self.D = D.to(dtypes.compute).view(sizes.groups, sizes.heads_a_group)
        self.states_shape = (*self.steps.through.shape, sizes.head_dim, sizes.state)
        self.shapes = shapes or self._in_a_row(chunk)
        self._buffers = {
            shape: Buffers(sizes, shape, dtypes, dt.device)
            for shape in sorted(set(self.shapes), key=lambda shape: -shape.all_tokens)
        }
        self._before = torch.ones(chunk, chunk, dtype=dtypes.compute, device=dt.device).tril_(-1)
        self._has_start: list[list[bool]] | None = None
        if self.steps.documents is not None:
            edges = self.steps.documents[..., :1] != self.steps.documents[..., -1:]
            self._has_start = edges.any(-1).tolist()

    def _in_a_row(self, chunk: int) -> list[BlockShape]:
        chunks, rest = divmod(self._length, chunk)
        elements = BLOCK_ELEMENTS_A_THREAD * torch.get_num_threads()
        step = max(1, elements // (chunk * self.sizes.channels))
        return [
            BlockShape(min(step, chunks - first), chunk) for first in range(0, chunks, step)
        ] + [BlockShape(1, rest)] * (rest > 0)

    def blocks(self, row: int) -> Iterator[Block]:
        """The blocks of one row in order; the last one holds what fills no chunk."""
        token = chunk = 0
        for shape, steps in zip(self.shapes, self.steps.of_blocks(row, self.shapes), strict=True):
            chunks = slice(chunk, chunk + shape.chunks)
            tokens = slice(token, token + shape.all_tokens)
            mask = self._mask(row, chunks, shape.tokens)
            yield Block(row, tokens, chunks, shape, steps, self._buffers[shape], mask)
            token, chunk = tokens.stop, chunks.stop

    def blocks_back(self, row: int, grads: StepGrads) -> Iterator[tuple[Block, BlockGrads]]:
        """The blocks of one row, the last one first, each with its part of `grads`."""
        parts = zip(self.blocks(row), grads.of_blocks(row, self.shapes), strict=True)
        return reversed(list(parts))

    def _mask(self, row: int, chunks: slice, tokens: int) -> Tensor:
        before = self._before[:tokens, :tokens]
        if self._has_start is None or not any(self._has_start[row][chunks]):
            return before
        assert self.steps.documents is not None
        documents = self.steps.documents[row, chunks, :tokens]
        return before * (documents[:, None, :, None] == documents[:, None, None, :])

    # -- forward ----------------------------------------------------------------------------------

    def scan(self, block: Block, carry: Tensor | None, states: Tensor) -> Tensor:
        """y of one block, without the token's own term: that is `own_term` times x.

        Args:
            block: which tokens; x, B and C are in its buffers.
            carry: state before the block [h, p, n]; becomes the state after it. [K, h, p, n]: of
                each chunk, which are of as many texts. None: `states` are given.
            states: states before each chunk [K, h, p, n], kept dtype; written from `carry`, read
                without.

        Returns:
            [T, h, p], a workspace, computing dtype.
        """
        at, steps = block.buffers, block.steps
        K, Q = block.shape
        g, r = self.sizes.groups, self.sizes.heads_a_group
        at.B_g.copy_(at.B_by_group)
        at.C_g.copy_(at.C_by_group)
        self._mix(block)
        multiply_into(at.inputs, at.x_by_head, steps.dt_by_head[..., None], at.product_by_head)
        torch.bmm(at.mixing_mm, at.inputs_mm, out=at.inner_mm)
        at.y_by_head.copy_(at.inner)

        to_end = steps.dt_to_end.view(K, Q, g, r, 1).transpose(1, 2)
        multiply_into(at.at_end, at.x_by_group, to_end, at.product_by_group)
        if carry is not None:
            torch.bmm(at.at_end_mm.mT, at.B_mm, out=at.added_mm)
            through = steps.through[..., None, None]
            if carry.dim() == states.dim():
                states.copy_(carry)
                carry.mul_(through).add_(copy_if_other(at.added_c, at.added))
            else:
                for k, passes in enumerate(through.unbind()):
                    states[k].copy_(carry)
                    carry.mul_(passes).add_(copy_if_other(at.added_c[k], at.added[k]))
        states = at.states_as(self.dtypes.operands, states)
        torch.bmm(at.C_mm, states.view(at.added_mm.shape).mT, out=at.outer_mm)
        from_start = steps.from_start.view(K, Q, g, r, 1).transpose(1, 2)
        at.y_by_group.addcmul_(copy_if_other(at.outer_c, at.outer), from_start)
        return at.y

    def own_term(self, block: Block) -> Tensor:
        """D + dt * (C . B): what a token's own x counts for in its y: [T, h, 1], after `scan`."""
        at = block.buffers
        torch.mul(block.steps.dt.view(at.own_term.shape), at.own[..., None], out=at.own_term)
        return at.own_term.add_(self.D).view(-1, self.sizes.heads, 1)

    def _mix(self, block: Block) -> None:
        """`mixing`: (C_i . B_j) * decay from j to i, for j < i of one document."""
        at, log2 = block.buffers, block.steps.log2_decay
        torch.bmm(at.C_mm, at.B_mm.mT, out=at.scores_mm)
        own = at.scores.diagonal(dim1=-2, dim2=-1).transpose(1, 2)
        at.own.view(own.shape).copy_(own)
        # The mask is on the scores, once a group, never on the exponent: exp2 is slow on -inf.
        copy_if_other(at.scores_c, at.scores).mul_(block.mask)
        at.decay.copy_(torch.sub(log2[..., None], log2[..., None, :], out=at.wide))
        at.decay.clamp_(LOWEST_LOG2, 0.0).exp2_()
        multiply_into(at.mixing, at.scores_c[:, :, None], at.decay_g, at.mixing_c)

    # -- backward ---------------------------------------------------------------------------------

    def backward(self, block: Block, grad_carry: Tensor, states: Tensor, grads: BlockGrads) -> None:
        """Gradients of one block, right after `scan` of it.

        Args:
            block: `grad_y` in its buffers is the gradient of y with the token's own term; those of
                x, B and C are left in `grad_x`, `grad_B` and `grad_C`.
            grad_carry: gradient of the state after the block [h, p, n]; becomes that of the state
                before it.
            states: as `scan` had them.
            grads: takes this block's part of what the gradients of dt, A and D need.
        """
        at, steps = block.buffers, block.steps
        K, Q = block.shape
        g, r = self.sizes.groups, self.sizes.heads_a_group
        states = at.states_as(self.dtypes.operands, states)
        torch.sum(torch.mul(at.grad_y, at.x, out=at.product), -1, out=grads.grad_y_x)
        torch.mul(at.grad_y_by_group, at.outer_c, out=at.product_by_group)
        torch.sum(at.product, -1, out=grads.grad_y_outer)
        grads.own.copy_(at.own)

        self._grad_states(block, grad_carry, states, grads)
        self._grad_mixing(block, grads)
        torch.bmm(at.scores_mm, at.B_mm, out=at.grad_mm)
        at.grad_mm.baddbmm_(at.grad_at_start_mm, states.view(at.added_mm.shape))
        at.grad_C_by_group.copy_(at.grad_g)
        torch.bmm(at.scores_mm.mT, at.C_mm, out=at.grad_mm)
        at.grad_mm.baddbmm_(at.at_end_mm, at.grad_after_mm)
        at.grad_B_by_group.copy_(at.grad_g)

        torch.bmm(at.B_mm, at.grad_after_mm.mT, out=at.outer_mm)
        outer = copy_if_other(at.outer_c, at.outer)
        torch.mul(at.x_by_group, outer, out=at.product_by_group)
        torch.sum(at.product, -1, out=grads.x_grad_outer)
        at.grad_x_by_head.copy_(at.grad_inner)
        torch.sum(torch.mul(at.x, at.grad_x, out=at.product), -1, out=grads.x_grad_inner)
        at.grad_x_by_group.addcmul_(outer, steps.to_end.view(K, Q, g, r, 1).transpose(1, 2))
        at.grad_x.mul_(steps.dt[..., None]).addcmul_(at.grad_y, self.own_term(block))

    def _grad_states(
        self, block: Block, grad_carry: Tensor, states: Tensor, grads: BlockGrads
    ) -> None:
        """`grad_after`: gradients of the states after each chunk; `grad_at_start`: of y, decayed
        from the start of its chunk."""
        at, steps = block.buffers, block.steps
        K, Q, g, r, _ = at.outer_T.shape
        from_start = steps.from_start.view(K, Q, g, r, 1).transpose(1, 2)
        multiply_into(at.grad_at_start, at.grad_y_by_group, from_start, at.product_by_group)
        torch.bmm(at.grad_at_start_mm.mT, at.C_mm, out=at.added_mm)
        through = steps.through[..., None, None].unbind()
        added = copy_if_other(at.added_c, at.added)
        states_c = at.states_as(self.dtypes.compute, states)
        for k in reversed(range(K)):
            at.grad_after[k].copy_(grad_carry)
            grad_carry.mul_(through[k])
            product = torch.mul(grad_carry, states_c[k], out=at.state_product)
            torch.sum(product, (-2, -1), out=grads.state[k])
            grad_carry.add_(added[k])

    def _grad_mixing(self, block: Block, grads: BlockGrads) -> None:
        """`grad_inner`: gradient of dt * x from later tokens of the chunk; `scores`: of C . B."""
        at = block.buffers
        at.inner.copy_(at.grad_y_by_head)
        torch.bmm(at.mixing_mm.mT, at.inner_mm, out=at.grad_inner_mm)
        torch.bmm(at.inner_mm, at.inputs_mm.mT, out=at.mixing_mm)
        at.decay_g.mul_(copy_if_other(at.mixing_c, at.mixing))
        torch.sum(at.decay_g, 2, out=at.grad_scores)
        at.grad_scores.mul_(block.mask)
        pairs = at.decay_g.mul_(at.scores_c[:, :, None]).view(at.decay.shape)
        pairs = at.wide.copy_(pairs)
        torch.sub(pairs.sum(-1), pairs.sum(-2), out=grads.pairs)
        own = torch.mul(block.steps.dt, grads.grad_y_x).view(at.own_term.shape).sum(-1)
        diagonal = at.grad_scores.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(own.view(diagonal.mT.shape).mT)
        at.scores.copy_(at.grad_scores)
