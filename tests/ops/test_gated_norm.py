"""The gate and the grouped norm: formula, gradients, dtypes, errors."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.gated_norm import rms_norm_grouped, silu_gate


@pytest.mark.parametrize("group_size", [2, 3, 12])
def test_norm_equals_formula_and_its_gradients(group_size: int) -> None:
    """Every group is normalised by itself; gradients agree with finite differences."""
    y = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    got = rms_norm_grouped(y, weight, group_size, 1e-5)
    for start in range(0, 12, group_size):
        group = slice(start, start + group_size)
        want = F.rms_norm(y[..., group], (group_size,), weight[group], 1e-5)
        torch.testing.assert_close(got[..., group], want)
    assert torch.autograd.gradcheck(
        lambda *inputs: rms_norm_grouped(*inputs, group_size, 1e-5), (y, weight)
    )


def test_norm_in_bfloat16() -> None:
    """Computed in float32: one rounding away from the exact result, weight's gradient in fp32."""
    y = torch.randn(7, 12).bfloat16().requires_grad_()
    weight = torch.randn(12, requires_grad=True)
    got = rms_norm_grouped(y, weight, 4, 1e-5)
    want = rms_norm_grouped(y.double(), weight.double(), 4, 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)
    got.sum().backward()
    assert y.grad is not None
    assert weight.grad is not None
    assert (y.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_norm_names_a_group_size_that_does_not_divide() -> None:
    """The message has both numbers."""
    with pytest.raises(UserError, match="group_size=5 must divide the 12 channels"):
        rms_norm_grouped(torch.ones(1, 12), torch.ones(12), 5, 1e-5)


def test_gate() -> None:
    """y * silu(z), in y's dtype."""
    y, z = torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    got = silu_gate(y, z)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), y.double() * F.silu(z.double()), rtol=2**-8, atol=0)
