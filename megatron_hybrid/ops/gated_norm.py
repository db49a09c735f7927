"""The gate of Mamba-2 and its RMSNorm over groups of channels: silu(z) first, then the norm.

Shapes: `...` any leading sizes, d channels, in groups of `group_size` neighbours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.errors import UserError


def silu_gate(y: Tensor, z: Tensor) -> Tensor:
    """y * silu(z), computed in float64 for float64 `y`, else in float32.

    Args:
        y: [..., d].
        z: gate [..., d].

    Returns:
        [..., d] in y's dtype.
    """
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    return (y.to(compute) * F.silu(z.to(compute))).to(y.dtype)


def inverse_rms(y: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(mean of y^2 + eps) over the last dimension: `[..., d]` -> `[..., 1]`.

    Few operations, for where a token has little work: without gradients, dtype of y. A number that
    torch makes a tensor of at each use costs as much as an operation, so `eps` is one.
    """
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return torch.addcmul(eps, norm, norm, value=1 / y.shape[-1]).rsqrt_()


def rms_norm_grouped(y: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
    """y / sqrt(mean over the group of y^2 + eps) * weight; keeps only y and one number a group.

    Args:
        y: [..., d]; computed in float64 if float64, else in float32.
        weight: [d].
        group_size: channels that share a mean; divides d.
        eps: added to the mean square.

    Returns:
        [..., d] in y's dtype.

    Raises:
        UserError: `group_size` does not divide d.
    """
    if y.shape[-1] % group_size:
        raise UserError(f"{group_size=} must divide the {y.shape[-1]} channels of y")
    return _GroupedRMSNorm.apply(y, weight, group_size, eps)


class _GroupedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, group_size: int, eps: float) -> Tensor:
        compute = torch.float64 if y.dtype == torch.float64 else torch.float32
        grouped = y.unflatten(-1, (-1, group_size)).to(compute)
        inverse = torch.rsqrt(grouped.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(y, weight, inverse)
        return (grouped * inverse).flatten(-2).mul_(weight.to(compute)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, inverse = ctx.saved_tensors
        channels, group_size = y.shape[-1], y.shape[-1] // inverse.shape[-2]
        normed = y.unflatten(-1, (-1, group_size)).to(inverse.dtype) * inverse
        grad = grad.to(inverse.dtype)
        grad_weight = (grad * normed.flatten(-2)).reshape(-1, channels).sum(0).to(weight.dtype)
        grad_normed = (grad * weight.to(inverse.dtype)).unflatten(-1, (-1, group_size))
        mean = (grad_normed * normed).mean(-1, keepdim=True)
        grad_y = grad_normed.sub_(normed.mul_(mean)).mul_(inverse)
        return grad_y.flatten(-2).to(y.dtype), grad_weight, None, None
