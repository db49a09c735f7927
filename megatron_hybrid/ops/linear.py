"""A linear map without bias, by the fastest matrix product that torch offers on the device.

Legend: ... any leading sizes, k inputs, n outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Below this many multiplications oneDNN's set-up, some 50 microseconds, costs more than it saves.
MIN_MULTIPLICATIONS = 2**22


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
