"""A product of each part of a packed tensor with a factor of its own, in one pass.

Shapes: `[..., w]`, parts of widths that add up to w.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_parts(packed: Tensor, widths: Iterable[int], factors: Iterable[float]) -> Tensor:
    """Multiply the parts of the last dimension, each with its factor.

    Not with a vector in the tensor's own format, which would round the factors; keeps nothing for
    the backward pass.

    Args:
        packed: `[..., w]`.
        widths: of the parts; their sum is w.
        factors: one a part.

    Returns:
        `[..., w]`, dtype of `packed`.
    """
    return _ScaledParts.apply(packed, tuple(widths), tuple(factors))


class _ScaledParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, widths: tuple[int, ...], factors: tuple[float, ...]
    ) -> Tensor:
        ctx.widths, ctx.factors = widths, factors
        return _scaled(packed, widths, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scaled(grad, ctx.widths, ctx.factors), None, None


def _scaled(packed: Tensor, widths: tuple[int, ...], factors: tuple[float, ...]) -> Tensor:
    scaled = torch.empty_like(packed)
    parts, own = packed.split(widths, -1), scaled.split(widths, -1)
    for part, out, factor in zip(parts, own, factors, strict=True):
        torch.mul(part, factor, out=out)
    return scaled
