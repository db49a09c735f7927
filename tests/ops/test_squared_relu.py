"""Squared ReLU: the formula, its gradient, and what it keeps."""

import torch

from megatron_hybrid.ops.squared_relu import squared_relu


def test_equals_formula_and_its_gradient() -> None:
    """max(x, 0)^2, with a gradient that agrees with finite differences."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_relu(x), x.clamp_min(0) ** 2)
    assert torch.autograd.gradcheck(squared_relu, (x,))


def test_in_bfloat16_equals_autograd() -> None:
    """Bit for bit what torch's own operations give, forward and backward."""
    x = torch.randn(500).bfloat16().requires_grad_()
    grad = torch.randn(500).bfloat16()
    expected = torch.pow(torch.relu(x), 2)
    got = squared_relu(x)
    assert torch.equal(got, expected)
    (actual_grad,) = torch.autograd.grad(got, x, grad)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    assert torch.equal(actual_grad, expected_grad)


def test_keeps_its_input_alone() -> None:
    """No other tensor waits for the backward pass."""
    kept: list[torch.Tensor] = []
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        squared_relu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_not_a_number_is_passed_on() -> None:
    """A NaN stays one, so that a run with NaNs is stopped."""
    assert squared_relu(torch.tensor([float("nan")])).isnan().all()
