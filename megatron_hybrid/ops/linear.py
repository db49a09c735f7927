"""A linear map without bias, by the fastest matrix product that torch offers on the device.

Legend: ... any leading sizes, k inputs, n outputs.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_hybrid.ops.bf16 import through_fp32

# Below this many multiplications oneDNN's set-up, some 50 microseconds, costs more than it saves.
MIN_MULTIPLICATIONS = 2**22
# What is widened of a bf16 operand at a time: 8 MiB of fp32, but no fewer rows than are worth it
# and no more than keep the block of the result small too.
WIDENED_ELEMENTS, WIDENED_ROWS = 2**21, (256, 2048)
# The most rows for which reading a bf16 operand as it is takes less time than widening it.
FEW_ROWS = 2


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, differentiable.

    Args:
        x: `[..., k]`. weight: `[n, k]`, same dtype.

    Returns:
        `[..., n]` in x's dtype.
    """
    return _Linear.apply(x, weight)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a `[..., k]` times b `[n, k]` transposed -> `[..., n]`; both may be views of any strides.

    bf16 operands are multiplied with fp32 sums, in fp32 where the processor knows no better.
    """
    if through_fp32(a) and not (a.numel() <= FEW_ROWS * a.shape[-1] and b.stride(-1) == 1):
        return _widened_product(a.flatten(0, -2), b).view(*a.shape[:-1], b.shape[0])
    return _product(a, b)


def _widened_product(a: Tensor, b: Tensor) -> Tensor:
    """a `[m, k]` times b `[n, k]` transposed -> `[m, n]`: bf16, by fp32 products of their blocks.

    Blocks, so that the fp32 copies, which are used once, take little memory.
    """
    result = a.new_empty(a.shape[0], b.shape[0])
    fewest, most = WIDENED_ROWS
    rows = min(max(WIDENED_ELEMENTS // max(a.shape[1], 1), fewest), most)
    a_blocks, b_blocks = (max(math.ceil(len(t) / rows), 1) for t in (a, b))
    for columns, b_rows in zip(result.chunk(b_blocks, dim=1), b.chunk(b_blocks), strict=True):
        wide = b_rows.float()
        for block, a_rows in zip(columns.chunk(a_blocks), a.chunk(a_blocks), strict=True):
            block.copy_(_product(a_rows.float(), wide))
    return result


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`product` in the operands' dtype.

    torch gives fp32 products on the CPU to MKL, which runs at half speed where the processor is
    not Intel's; oneDNN, which has the bf16 ones anyway, is as fast as MKL on the others.
    """
    if (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and a.numel() * b.shape[0] >= MIN_MULTIPLICATIONS
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return result
    return torch.matmul(a, b.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows_grad, rows_x = grad.flatten(0, -2), x.flatten(0, -2)
        grad_x = product(rows_grad, weight.t()).view(x.shape)
        # oneDNN copies a left operand that is transposed, so the narrower one should be it.
        if rows_grad.shape[1] <= rows_x.shape[1]:
            return grad_x, product(rows_grad.t(), rows_x.t())
        return grad_x, product(rows_x.t(), rows_grad.t()).t()
