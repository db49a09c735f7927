"""A product of each part of a packed tensor with a factor of its own."""

import torch

from megatron_hybrid.ops.scaled_parts import scaled_parts


def test_forward_and_gradient() -> None:
    """Those of the parts one by one."""
    packed = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    widths, factors = (2, 0, 4, 1), (0.5, 9.0, 1.0, -3.0)
    expected = torch.cat(
        [part * factor for part, factor in zip(packed.split(widths, -1), factors, strict=True)], -1
    )
    assert torch.equal(scaled_parts(packed, widths, factors), expected)
    assert torch.autograd.gradcheck(lambda x: scaled_parts(x, widths, factors), packed)


def test_factors_are_not_rounded() -> None:
    """In bf16 the product is rounded, and not the factor before it."""
    packed = torch.randn(64).bfloat16()
    factor = 0.3535533905932738
    assert torch.equal(scaled_parts(packed, [64], [factor]), (packed.float() * factor).bfloat16())
