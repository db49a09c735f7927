"""The causal convolution: against PyTorch's own, over documents, and token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.causal_conv1d import causal_conv1d

BATCH, LENGTH, CHANNELS, TAPS = 2, 20, 6, 4


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """x [b, l, c], weight [c, k] and bias [c] in float64, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, LENGTH, CHANNELS), (CHANNELS, TAPS), (CHANNELS,))
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    return x, weight, bias


def test_equals_conv1d(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Values and gradients are those of `F.conv1d` with padding on the left."""
    x, weight, bias = tensors
    got = causal_conv1d(x, weight, bias)
    padded = F.pad(x.transpose(1, 2), (TAPS - 1, 0))
    want = F.silu(F.conv1d(padded, weight[:, None], bias, groups=CHANNELS)).transpose(1, 2)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(got, tensors, grad), torch.autograd.grad(want, tensors, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_taps_stay_in_their_document(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    """Packed documents, some shorter than the taps, give what each gives alone; so does the state.
    A label that comes back is a new document."""
    x, weight, bias = tensors
    lengths = (7, 1, 2, 8, 2)
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 5, 0]), torch.tensor(lengths))
    got, state = causal_conv1d(
        x, weight, bias, seq_idx=seq_idx.expand(BATCH, -1), return_final_state=True
    )
    alone = [
        causal_conv1d(part, weight, bias, return_final_state=True)
        for part in x.split(lengths, dim=1)
    ]
    torch.testing.assert_close(got, torch.cat([y for y, _ in alone], dim=1))
    torch.testing.assert_close(state, alone[-1][1])


@pytest.mark.parametrize("first", [1, 2, 3, 11])
def test_state_continues_a_sequence(tensors: tuple[Tensor, Tensor, Tensor], first: int) -> None:
    """Two parts equal the whole."""
    x, weight, bias = tensors
    want = causal_conv1d(x, weight, bias)
    y, state = causal_conv1d(x[:, :first], weight, bias, return_final_state=True)
    rest = causal_conv1d(x[:, first:], weight, bias, initial_state=state)
    torch.testing.assert_close(torch.cat([y, rest], dim=1), want)


def test_keeps_bfloat16() -> None:
    """bf16 in, bf16 out, computed in float32: one rounding away from the exact result."""
    x, weight = torch.randn(1, 9, 3).bfloat16(), torch.randn(3, TAPS)
    got = causal_conv1d(x, weight)
    want = causal_conv1d(x.double(), weight.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
