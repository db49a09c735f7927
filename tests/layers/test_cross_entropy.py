"""Cross-entropy over one rank's vocabulary and over a sharded one, against torch's in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.testing import run_distributed

SEQUENCE, BATCH, VOCABULARY = 37, 3, 40


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[s, b, v]` some of which are large, labels `[s, b]`, and a gradient `[s, b]`."""
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=draws) * 4
    logits[0] += 300.0
    labels = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=draws)
    grad = torch.rand(SEQUENCE, BATCH, generator=draws)
    grad[1] = 0.0  # tokens that the loss mask leaves out
    return logits.to(dtype), labels, grad


def loss_and_gradient(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """On a rank: losses `[s, b]` and the gradient of this rank's shard of the logits."""
    from megatron_hybrid.layers import cross_entropy

    # Several blocks, the last of them a smaller one.
    cross_entropy.BLOCK_LOGITS = 5 * VOCABULARY
    logits, labels, grad = inputs(dtype)
    # A copy: the gradient takes the place of the logits.
    shard = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone().requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    losses = cross_entropy.vocab_parallel_cross_entropy(shard * 1.0, labels, group)
    losses.backward(grad)
    assert shard.grad is not None
    return losses.detach(), shard.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_float64(ranks: int, dtype: torch.dtype) -> None:
    """Losses on every rank, and the gradient put together, but for the rounding of the dtype."""
    results = run_distributed(loss_and_gradient, ranks, dtype)
    logits, labels, grad = inputs(dtype)
    exact_logits = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_logits.flatten(0, 1), labels.flatten(), reduction="none")
    exact.backward(grad.flatten().double())
    for losses, _ in results:
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.flatten().double(), exact, rtol=1e-6, atol=1e-4)
    gradient = torch.cat([part for _, part in results], dim=-1)
    assert gradient.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        gradient.double(), exact_logits.grad, rtol=rounding, atol=1e-6 if rounding < 1e-4 else 1e-5
    )
