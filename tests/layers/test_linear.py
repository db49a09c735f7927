"""What the linears keep for their backward pass."""

import weakref

import torch

from megatron_hybrid.ops.linear import linear
from megatron_hybrid.platform import initialize


def test_tensor_is_made_again_in_backward() -> None:
    """The tensor goes when its user drops it, and the gradients are those of keeping it."""
    initialize()
    from megatron_hybrid.layers.linear import made_again_in_backward

    x = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad(linear(x * 2, weight).sum(), (x, weight))

    doubled = x * 2
    with made_again_in_backward(doubled, lambda: x * 2):
        output = linear(doubled, weight)
    dropped = weakref.ref(doubled)
    del doubled
    assert dropped() is None
    torch.testing.assert_close(torch.autograd.grad(output.sum(), (x, weight)), expected)
