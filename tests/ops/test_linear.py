"""The linear map, its gradients against float64, which kernel it takes and what memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.ops import linear as ops_linear
from megatron_hybrid.ops.linear import linear

# Nothing, one row, sizes under and over the threshold from which oneDNN is called.
SHAPES = [((0, 2, 5), 4), ((1, 1, 40), 7), ((3, 2, 5), 4), ((64, 2, 96), 512)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is widened at a time is a part of the tests' tensors."""
    monkeypatch.setattr(ops_linear, "WIDENED_ELEMENTS", 50 * 96)
    monkeypatch.setattr(ops_linear, "WIDENED_ROWS", (2, 60))


@pytest.mark.parametrize(("x_shape", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_float64(
    x_shape: tuple[int, ...],
    outputs: int,
    dtype: torch.dtype,
    bf16_products: str,
    small_blocks: None,
) -> None:
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


@pytest.mark.parametrize("rows", [1, 130])
def test_bf16_products_are_rounded_once(rows: int, bf16_products: str, small_blocks: None) -> None:
    """Each number is the exact one in bf16, but for fp32 sums: operands that cancel tell."""
    draws = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(n, 300, generator=draws).bfloat16() for n in (rows, 110))
    got = ops_linear.product(a, b)
    exact = a.double() @ b.double().t()
    of_sums = 300 * 2**-24 * (a.double().abs() @ b.double().abs().t())
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + of_sums).all()


class LargestFp32(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation gives out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("shape", [(2500, 40, 3000), (600, 10_000, 40)])
def test_widening_takes_little_memory(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operand and no result is in fp32 as a whole: each time the 16 MiB of one block at most."""
    rows, inputs, outputs = shape
    monkeypatch.setattr(ops_linear, "through_fp32", lambda tensor: True)
    a, b = (torch.ones(n, inputs, dtype=torch.bfloat16) for n in (rows, outputs))
    with LargestFp32() as largest:
        ops_linear.product(a, b)
    assert 0 < largest.elements <= max(2**22, 256 * inputs)


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
