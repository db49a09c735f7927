"""KL divergence from what was kept of a teacher, over a vocabulary that is whole or sharded,
against its closed form in float64."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.layers.vocabulary import PADDING_LOGIT
from megatron_hybrid.testing import run_distributed

SEQUENCE, BATCH, VOCABULARY, WORDS = 19, 2, 40, 37


class Case(NamedTuple):
    """How much is kept, and of which divergence."""

    k: int
    top_p: float | None = None
    forward_share: float = 1.0
    temperature: float = 1.0
    near: bool = False


CASES = [
    Case(5), Case(5, temperature=0.5), Case(3, forward_share=0.3, temperature=2.0),
    Case(8, top_p=0.7), Case(WORDS), Case(WORDS, forward_share=0.0, temperature=4.0),
    Case(5, near=True), Case(WORDS, near=True), Case(1, forward_share=0.5),
]  # fmt: skip


def inputs(near: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both logits `[s, b, v]`, labels `[s, b]`, gradients `[s, b]` of divergence and loss."""
    draws = torch.Generator().manual_seed(1)
    size = (SEQUENCE, BATCH, VOCABULARY)
    student, teacher = (torch.randn(size, generator=draws) * 4 for _ in range(2))
    if near:
        teacher = student + torch.randn(size, generator=draws) * 0.01
    student[0] += 300.0
    teacher[1, :, 3] = teacher[1, :, 9]  # equally likely
    if not near:
        student[2, :, :5] += 150.0  # the rest is nothing
        teacher[3, :, 7] += 80.0
    student[..., WORDS:] = teacher[..., WORDS:] = PADDING_LOGIT
    labels = torch.randint(0, WORDS, (SEQUENCE, BATCH), generator=draws)
    of_divergence, of_loss = torch.rand(2, SEQUENCE, BATCH, generator=draws)
    of_divergence[4] = of_loss[4] = 0.0  # rows that the loss mask leaves out
    return student, teacher, labels, of_divergence, of_loss


def found_of_cases() -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """On a rank: of each case what is found of tokens, the gradient of the shard, and kept ids."""
    from megatron_hybrid.layers import kl_divergence
    from megatron_hybrid.layers import tail_divergence as tail

    # Several blocks, the last of them a smaller one.
    kl_divergence.BLOCK_LOGITS = {"cpu": 5 * VOCABULARY}
    group = dist.group.WORLD
    assert group is not None
    results = []
    for case in CASES:
        student, teacher, labels, of_divergence, of_loss = inputs(case.near)
        shard, other = (
            each.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].clone()
            for each in (student, teacher)
        )
        ids, values, log_sum, log_tail, loss = tail.keep(
            other, labels, case.k, group, words=WORDS, temperature=case.temperature,
            top_p=case.top_p, min_k=2,
        )  # fmt: skip
        log_p = (values.double() / case.temperature - log_sum[..., None]).float()
        kept = tail.Kept(ids, log_p.masked_fill(ids < 0, -torch.inf), log_tail, loss)
        shard.requires_grad_()
        found = tail.vocab_parallel_tail_divergence(
            shard * 1.0, kept, labels, group,
            forward_share=case.forward_share, temperature=case.temperature,
        )  # fmt: skip
        total = (found.divergence * of_divergence).sum() + (found.student_loss * of_loss).sum()
        total.backward()
        assert shard.grad is not None
        results.append(([each.detach() for each in found], shard.grad, ids))
    return results


def exact(case: Case, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same by its definition, in float64, and the divergence over all tokens."""
    student, teacher, labels, of_divergence, of_loss = inputs(case.near)
    logits = student.double().requires_grad_()
    both = [logits[..., :WORDS], teacher[..., :WORDS].double()]
    log_q, log_p = (F.log_softmax(each / case.temperature, dim=-1) for each in both)
    is_kept = torch.zeros(*labels.shape, WORDS + 1, dtype=torch.bool)
    is_kept.scatter_(-1, ids.masked_fill(ids < 0, WORDS), True)
    is_kept = is_kept[..., :WORDS]

    def classes(log: Tensor) -> Tensor:
        """Kept tokens where they stand, the others as -inf, and then all of these as one."""
        tail = log.masked_fill(is_kept, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log.masked_fill(~is_kept, -torch.inf), tail], dim=-1)

    def divergence(one: Tensor, other: Tensor) -> Tensor:
        there = torch.isfinite(one)
        apart = one.masked_fill(~there, 0) - other.masked_fill(~there, 0)
        return (one.masked_fill(~there, -torch.inf).exp() * apart).sum(-1)

    p, share = classes(log_p), case.forward_share
    # What is not there has no gradient to give.
    q = classes(log_q) if case.k < WORDS else torch.cat([log_q, p[..., -1:]], dim=-1)
    found = share * divergence(p, q) + (1 - share) * divergence(q, p)
    whole = share * divergence(log_p, log_q) + (1 - share) * divergence(log_q, log_p)
    loss, teacher_loss = (
        F.cross_entropy(each.permute(0, 2, 1), labels, reduction="none") for each in both
    )
    agree = (both[0].argmax(-1) == both[1].argmax(-1)).double()
    ((found * of_divergence).sum() + (loss * of_loss).sum()).backward()
    assert logits.grad is not None
    return [found.detach(), loss.detach(), teacher_loss, agree, whole.detach()], logits.grad


@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_its_closed_form(ranks: int) -> None:
    """Value, losses, agreement and gradient, of kept tokens few and all, in a nucleus, equally
    likely and sure; rows that the mask leaves out have no gradient, nor has the padding. It is at
    most the divergence over all tokens, and that itself where all are kept."""
    of_ranks = run_distributed(found_of_cases, ranks)
    for number, case in enumerate(CASES):
        found, _, ids = of_ranks[0][number]
        gradient = torch.cat([rank[number][1] for rank in of_ranks], dim=-1)
        expected, its = exact(case, ids)
        for name, one, other in zip(found_names(), found, expected, strict=False):
            error = (one - other).abs() / other.abs().clamp_min(1.0)
            assert error.max() < 2e-6, f"{case}: {name} {error.max():.1e}"
        error = (gradient - its).norm() / its.norm()
        assert error < 2e-6, f"{case}: gradient {error:.1e}"
        assert not gradient[4].any() and not gradient[..., WORDS:].any()
        assert (found[0] >= 0).all()
        assert (found[0] <= expected[4] * (1 + 1e-5) + 1e-6).all()
        if case.k == WORDS:
            assert found[0] == pytest.approx(expected[4], rel=1e-4, abs=1e-5)
        if case.top_p is not None:
            counts = (ids >= 0).sum(-1)
            assert counts.min() == 2 and 2 < counts.max() <= case.k
        for rank in of_ranks[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank[number][0], found, strict=True))


def found_names() -> list[str]:
    return ["divergence", "student's loss", "teacher's loss", "agreement"]
