"""KL divergence over a vocabulary that is whole or sharded, against its formula in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.layers.vocabulary import PADDING_LOGIT
from megatron_hybrid.testing import run_distributed

SEQUENCE, BATCH, VOCABULARY = 37, 3, 40
WORDS = 37  # of the vocabulary: the others are padding, all on the last rank
EXTREME = (2, 3)  # places where one is sure of what the other all but excludes
# Share of the forward divergence, temperature.
CASES = [(1.0, 1.0), (1.0, 0.5), (0.0, 1.0), (0.0, 2.0), (0.3, 4.0), (1.0, 4.0)]


def inputs(dtype: torch.dtype, near: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both logits `[s, b, v]`, labels `[s, b]`, and gradients `[s, b]` of divergence and loss."""
    draws = torch.Generator().manual_seed(1)
    size = (SEQUENCE, BATCH, VOCABULARY)
    student = torch.randn(size, generator=draws) * 4
    teacher = torch.randn(size, generator=draws) * 4
    if near:
        teacher = student + torch.randn(size, generator=draws) * 0.01
    student[0] += 300.0
    if not near:
        student[EXTREME[0], :, :5] += 150.0
        teacher[EXTREME[1], :, 7] += 200.0
    student[..., WORDS:] = teacher[..., WORDS:] = PADDING_LOGIT
    labels = torch.randint(0, WORDS, (SEQUENCE, BATCH), generator=draws)
    of_divergence, of_loss = torch.rand(2, SEQUENCE, BATCH, generator=draws)
    of_divergence[1] = of_loss[1] = 0.0  # tokens that the loss mask leaves out
    return student.to(dtype), teacher.to(dtype), labels, of_divergence, of_loss


def divergence_and_gradient(
    dtype: torch.dtype, near: bool, learns: bool
) -> list[tuple[list[Tensor], Tensor]]:
    """On a rank: for each case, what is found of each token, and the gradient of the shard."""
    from megatron_hybrid.layers import kl_divergence

    # Several blocks, the last of them a smaller one.
    kl_divergence.BLOCK_LOGITS = {"cpu": 5 * VOCABULARY}
    group = dist.group.WORLD
    assert group is not None
    results = []
    for forward_share, temperature in CASES:
        student, teacher, labels, of_divergence, of_loss = inputs(dtype, near)
        shard, other = (
            each.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone()
            for each in (student, teacher)
        )
        shard.requires_grad_()
        # Another tensor: the gradient takes the place of the logits.
        found = kl_divergence.vocab_parallel_divergence(
            shard * 1.0, other, labels, group,
            forward_share=forward_share, temperature=temperature,
        )  # fmt: skip
        total = (found.divergence * of_divergence).sum()
        if learns:
            total = total + (found.student_loss * of_loss).sum()
        total.backward()
        assert shard.grad is not None
        results.append(([each.detach() for each in found], shard.grad))
    return results


def exact(
    dtype: torch.dtype, near: bool, learns: bool, forward_share: float, temperature: float
) -> tuple[list[Tensor], Tensor]:
    """The same by its definition, in float64."""
    student, teacher, labels, of_divergence, of_loss = inputs(dtype, near)
    logits = student.double().requires_grad_()
    log_q = F.log_softmax(logits[..., :WORDS] / temperature, dim=-1)
    log_p = F.log_softmax(teacher[..., :WORDS].double() / temperature, dim=-1)
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    divergence = forward_share * forward + (1 - forward_share) * reverse
    losses = [
        F.cross_entropy(each.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        for each in (logits, teacher.double())
    ]
    total = (divergence * of_divergence).sum()
    if learns:
        total = total + (losses[0] * of_loss).sum()
    total.backward()
    agreement = (student.argmax(-1) == teacher.argmax(-1)).double()
    assert logits.grad is not None
    return [divergence.detach(), losses[0].detach(), losses[1], agreement], logits.grad


@pytest.mark.parametrize("learns", [False, True], ids=["divergence alone", "with labels"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_float64(ranks: int, learns: bool) -> None:
    """What is found of each token, on every rank, and the gradient put together: at 1e-6, and
    where hundreds of nats cancel, at 4e-6."""
    of_ranks = run_distributed(divergence_and_gradient, ranks, torch.float32, False, learns)
    for number, case in enumerate(CASES):
        expected, gradient = exact(torch.float32, False, learns, *case)
        for results in of_ranks:
            for value, reference in zip(results[number][0], expected, strict=True):
                assert value.dtype == torch.float32
                torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-6)
        actual = torch.cat([results[number][1] for results in of_ranks], dim=-1)
        error = actual.double() - gradient
        assert error.norm() <= 4e-6 * gradient.norm()
        usual = [place for place in range(SEQUENCE) if place not in EXTREME]
        assert error[usual].norm() <= 1e-6 * gradient[usual].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_distributions(dtype: torch.dtype) -> None:
    """Nearly equal ones: a divergence of 1e-5 is right to 1e-3 of it, as its gradient is, none is
    negative, and bf16 logits give what they give in float64."""
    (results,) = run_distributed(divergence_and_gradient, 1, dtype, True, False)
    for (found, actual), case in zip(results, CASES, strict=True):
        expected, gradient = exact(dtype, True, False, *case)
        divergence = found[0].double()
        assert divergence.min() >= 0.0
        torch.testing.assert_close(divergence, expected[0], rtol=1e-3, atol=1e-9)
        error = (actual.double() - gradient).norm() / gradient.norm()
        assert error <= (1e-4 if dtype == torch.float32 else 2**-8)


def equal_logits() -> tuple[list[Tensor], list[Tensor]]:
    """On a rank: divergences of a student that is its teacher, and the gradients."""
    from megatron_hybrid.layers.kl_divergence import vocab_parallel_divergence

    group = dist.group.WORLD
    assert group is not None
    divergences, gradients = [], []
    for forward_share, temperature in CASES:
        student, _, labels, *_ = inputs(torch.bfloat16)
        logits = student.clone().requires_grad_()
        found = vocab_parallel_divergence(
            logits * 1.0, student, labels, group,
            forward_share=forward_share, temperature=temperature,
        )  # fmt: skip
        found.divergence.sum().backward()
        assert logits.grad is not None and bool(found.agreement.all())
        divergences.append(found.divergence.detach())
        gradients.append(logits.grad)
    return divergences, gradients


def test_equal_distributions() -> None:
    """A student that is its teacher has a divergence and a gradient of 0, to the bit."""
    ((divergences, gradients),) = run_distributed(equal_logits, 1)
    assert not any(bool(each.any()) for each in [*divergences, *gradients])
