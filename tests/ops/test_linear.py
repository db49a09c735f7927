"""The linear map, its gradients against float64, and which kernel it takes."""

import pytest
import torch

from megatron_hybrid.ops import linear as ops_linear
from megatron_hybrid.ops.linear import linear

# Sizes under and over the threshold from which oneDNN is called, and a batch dimension.
SHAPES = [((3, 2, 5), 4), ((64, 2, 96), 512)]


@pytest.mark.parametrize(("x_shape", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(x_shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> None:
    """Output and both gradients are those of float64, but for the rounding of the dtype."""
    x = torch.randn(x_shape).to(dtype).requires_grad_()
    weight = torch.randn(outputs, x_shape[-1]).to(dtype).requires_grad_()
    grad = torch.randn(*x_shape[:-1], outputs).to(dtype)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = exact_x @ exact_weight.t()
    exact.backward(grad.double())
    got = linear(x, weight)
    got.backward(grad)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for actual, expected in (
        (got, exact),
        (x.grad, exact_x.grad),
        (weight.grad, exact_weight.grad),
    ):
        assert actual is not None and expected is not None
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()


def test_gradients_of_a_gradient_that_is_no_block_of_memory() -> None:
    """A gradient that comes as a transposed view counts as the tensor that it shows."""
    x = torch.randn(128, 96, requires_grad=True)
    weight = torch.randn(512, 96, requires_grad=True)
    grad = torch.randn(512, 128).t()
    from_view = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    from_block = torch.autograd.grad(linear(x, weight), (x, weight), grad.contiguous())
    torch.testing.assert_close(from_view, from_block)


@pytest.mark.parametrize(("rows", "expected"), [(1, False), (1024, True)])
def test_small_products_are_left_to_torch(
    rows: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN gets the large fp32 products alone."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    matmul, calls = torch.matmul, []
    monkeypatch.setattr(torch, "matmul", lambda *args: calls.append(args) or matmul(*args))
    ops_linear.product(torch.ones(rows, 64), torch.ones(128, 64))
    assert (not calls) == expected
