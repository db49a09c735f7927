"""SSD in chunks by plain torch operations: fast on the CPU, and keeps little for its backward.

Shapes: b batch, l tokens, h heads, p head_dim, g groups, n state; N chunks. Block by block: see
`block.py`. Kept for the backward: the inputs and the states before each chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd.block import Block, BlockScan
from megatron_hybrid.ops.ssd.buffers import DTypes, Sizes
from megatron_hybrid.ops.ssd.steps import StepGrads


def ssd_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SSD by chunks; arguments as in `megatron_hybrid.ops.ssd.ssd`.

    Computes in float64 for float64 `x`, else in float32; for bfloat16 `x` the GEMMs take bfloat16
    operands where the device multiplies those. Differentiable once, for every float argument.

    Returns:
        y [b, l, h, p] in x's dtype and the final states [b, h, p, n] in the computing dtype.
    """
    documents = None if seq_idx is None else number_documents(seq_idx)
    return _ChunkedSSD.apply(x, dt, A, B, C, D, initial_states, documents)


class _ChunkedSSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_states: Tensor | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scan = _block_scan(x, dt, A, B, D, documents)
        carry = x.new_zeros(*x.shape[:1], *scan.states_shape[2:], dtype=scan.dtypes.compute)
        if initial_states is not None:
            carry.copy_(initial_states)
        states = x.new_empty(scan.states_shape, dtype=scan.dtypes.kept)
        y = torch.empty_like(x)
        for row in range(x.shape[0]):
            for block in scan.blocks(row):
                _load(block, x, B, C)
                out = scan.scan(block, carry[row], states[row, block.chunks])
                y[row, block.tokens] = out.addcmul_(block.buffers.x, scan.own_term(block))
        ctx.save_for_backward(x, dt, A, B, C, D, initial_states, documents, states)
        return y, carry

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial_states, documents, states = ctx.saved_tensors
        scan = _block_scan(x, dt, A, B, D, documents)
        grads = StepGrads(scan.steps, scan.sizes.groups)
        grad_x, grad_B, grad_C = torch.empty_like(x), torch.empty_like(B), torch.empty_like(C)
        grad_carry = grad_final.to(scan.dtypes.compute, copy=True)
        for row in range(x.shape[0]):
            for block, block_grads in scan.blocks_back(row, grads):
                at, tokens, before = block.buffers, block.tokens, states[row, block.chunks]
                _load(block, x, B, C)
                scan.scan(block, None, before)
                at.grad_y.copy_(grad_y[row, tokens])
                scan.backward(block, grad_carry[row], before, block_grads)
                grad_x[row, tokens] = at.grad_x
                grad_B[row, tokens] = at.grad_B
                grad_C[row, tokens] = at.grad_C
        grad_dt, grad_A, grad_D = grads.finish(A)
        return (
            grad_x,
            grad_dt.to(dt.dtype),
            grad_A.to(A.dtype),
            grad_B,
            grad_C,
            None if D is None else grad_D.to(D.dtype),
            None if initial_states is None else grad_carry.to(initial_states.dtype),
            None,
        )


def _block_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, D: Tensor | None, documents: Tensor | None
) -> BlockScan:
    dtypes = DTypes.of(x)
    sizes = Sizes(x.shape[2], x.shape[3], B.shape[2], B.shape[3])
    skip = torch.zeros_like(A) if D is None else D
    return BlockScan(sizes, dt.to(dtypes.compute), A, skip, documents, dtypes)


def _load(block: Block, x: Tensor, B: Tensor, C: Tensor) -> None:
    """Copies the block's tokens into its buffers."""
    at = block.buffers
    for buffer, tensor in ((at.x, x), (at.B, B), (at.C, C)):
        buffer.copy_(tensor[block.row, block.tokens])
