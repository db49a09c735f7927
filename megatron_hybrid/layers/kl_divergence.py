"""KL divergence of a student's next token from a teacher's, over a vocabulary sharded over TP.

With p the teacher's distribution, q the student's and d = log q - log p, both at a temperature:

    forward   KL(p, q) = sum of p (expm1(d) - d)
    reverse   KL(q, p) = sum of q d - p expm1(d)

These are the usual sums plus sum(q) - sum(p) = 0. No term is negative, so that nearly equal
distributions do not cancel, and a log-sum-exp's rounding, which shifts all d alike, does so.

Legend: s sequence, b batch, v vocabulary of this TP rank; rows are the n = s * b tokens, r of them
a block.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that are worked on at a time, by kind of device: so that temporaries stay in the
# processor's cache, or so that a kernel has enough to do.
BLOCK_LOGITS = {"cpu": 2**19, "cuda": 2**24}
# A d whose expm1 is finite in fp32; of a larger one p is nothing beside q.
_FAR = 80.0
# Of logits: what all of a token's are moved by is a multiple of it.
_STEP = 0.125


class Divergence(NamedTuple):
    """What a student's and a teacher's logits say of tokens, `[s, b]` fp32 each.

    Attributes:
        divergence: of the two from each other, in nats.
        student_loss: cross-entropy of the labels, in nats, at temperature 1.
        teacher_loss: the same of the teacher; has no gradient.
        agreement: 1 where a most likely token of the one is one of the other; has no gradient.
    """

    divergence: Tensor
    student_loss: Tensor
    teacher_loss: Tensor
    agreement: Tensor


def vocab_parallel_divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    tp_group: dist.ProcessGroup,
    *,
    forward_share: float = 1.0,
    temperature: float = 1.0,
) -> Divergence:
    """KL divergence of each token, computed in fp32, a few rows at a time, again in backward.

    The gradient takes the place of the student's logits in memory: they must not be used
    elsewhere, and backward can run once. The teacher gets none. Beside the logits, what is kept
    for backward is a few numbers a row.

    Args:
        student: `[s, b, v]`, fp32 or bf16; TP rank r holds the ids r * v to (r + 1) * v - 1.
            Padding of the vocabulary is far below all logits of both (`layers.vocabulary`).
        teacher: of the same shape, fp32 or bf16.
        labels: `[s, b]` int64 ids of the whole vocabulary.
        forward_share: of KL(teacher, student), 0 to 1; the rest is of KL(student, teacher).
        temperature: what both logits are divided by, for the divergence alone. There is no factor
            of its square, which keeps the size of the gradient: it is part of a weight.

    Returns:
        The same on every TP rank.
    """
    found = _VocabParallelDivergence.apply(
        student, teacher, labels, tp_group, forward_share, temperature
    )
    return Divergence(*found)


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of logits `[n, v]` to be worked on at a time, of about `BLOCK_LOGITS`."""
    rows, vocabulary = logits.shape
    size = max(1, BLOCK_LOGITS[logits.device.type] // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _VocabParallelDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup,
        forward_share: float,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        vocabulary = student.shape[-1]
        pair = _Pair(student.view(-1, vocabulary), teacher.reshape(-1, vocabulary), temperature)
        local = labels.reshape(-1) - tp_group.rank() * vocabulary
        elsewhere = (local < 0) | (local >= vocabulary)
        local = local.masked_fill(elsewhere, 0)[:, None]
        at_label = torch.cat([rows.gather(1, local) for rows in pair.both], dim=1).float()
        at_label.masked_fill_(elsewhere[:, None], 0.0)
        if tp_group.size() > 1:
            dist.all_reduce(at_label, group=tp_group)
        norms = _norms(pair, tp_group)
        # Written into, rather than put together: what is kept of a block would lie where the next
        # one's temporaries could, and the heap grow with every block.
        both = norms.largest.new_empty(norms.largest.shape)
        agree = both.new_empty(len(both))
        for rows in pair.blocks():
            both[rows] = _divergences(pair.terms(rows, norms, forward_share), forward_share)
            agree[rows] = pair.agree(rows, norms).float()
        if tp_group.size() > 1:
            dist.all_reduce(both, group=tp_group)
            dist.all_reduce(agree, op=dist.ReduceOp.MAX, group=tp_group)
        divergence = forward_share * both[:, 0] + (1.0 - forward_share) * both[:, 1]
        losses = (norms.plain - (at_label.double() - norms.largest.double())).float()
        ctx.save_for_backward(*pair.both, *norms, both[:, 1:], local, elsewhere)
        ctx.forward_share, ctx.temperature = forward_share, temperature
        shape = labels.shape
        found = (losses[:, 0].reshape(shape), losses[:, 1].reshape(shape), agree.view(shape))
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return divergence.view(shape), *found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_divergence: Tensor | None, of_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        student, teacher, *of_rows, reverse, local, elsewhere = ctx.saved_tensors
        pair, norms = _Pair(student, teacher, ctx.temperature), _Norms(*of_rows)
        given = of_divergence if of_divergence is not None else of_loss
        if given is None:
            return (None,) * 6
        for rows in pair.blocks():
            grad: Tensor | None = None
            if of_divergence is not None:
                scale = of_divergence.reshape(-1, 1)[rows] / ctx.temperature
                terms = pair.terms(rows, norms, ctx.forward_share)
                grad = _slope(terms, reverse[rows], ctx.forward_share).mul_(scale)
            if of_loss is not None:
                scale = of_loss.reshape(-1, 1)[rows]
                log_q = (student[rows] - norms.largest[rows, :1]).sub_(
                    norms.plain[rows, :1].float()
                )
                of_labels = log_q.exp_().mul_(scale)
                ones = (elsewhere[rows, None].float() - 1.0) * scale
                of_labels.scatter_add_(1, local[rows], ones)
                grad = of_labels if grad is None else grad.add_(of_labels)
            student[rows] = grad
        return student.view(*given.shape, -1), None, None, None, None, None


class _Norms(NamedTuple):
    """Of all rows over the whole vocabulary, the student's and the teacher's beside each other.

    Attributes:
        largest: `[n, 2]` fp32, the largest logits.
        at_temperature: `[n, 2]` float64, log of the sum of exp((logit - largest) / temperature).
        plain: `[n, 2]` float64, the same at temperature 1.
    """

    largest: Tensor
    at_temperature: Tensor
    plain: Tensor


class _Pair:
    """Student's and teacher's logits, `[n, v]` each, looked at a block of rows at a time."""

    def __init__(self, student: Tensor, teacher: Tensor, temperature: float) -> None:
        self.both = (student, teacher)
        self.temperature = temperature

    def blocks(self) -> Iterator[slice]:
        return row_blocks(self.both[0])

    def log_probabilities(self, side: int, rows: slice, norms: _Norms) -> Tensor:
        """`[r, v]` fp32, at the temperature; of the student (0) or the teacher (1)."""
        found = self.both[side][rows].float() - norms.largest[rows, side, None]
        if self.temperature != 1.0:
            found.div_(self.temperature)
        return found.sub_(norms.at_temperature[rows, side, None].float())

    def distances(self, rows: slice, norms: _Norms) -> Tensor:
        """d = log q - log p, `[r, v]` fp32.

        Logits are subtracted from each other before anything is rounded to how large they are; so
        is a distance between them that all have in common, in steps that leave small ones alone.
        """
        student, teacher = norms.largest[rows].double().split(1, dim=1)
        apart = student - teacher
        common = (apart / _STEP).round_().mul_(_STEP)
        d = (self.both[0][rows].float() - common.float()).sub_(self.both[1][rows].float())
        if self.temperature != 1.0:
            d.div_(self.temperature)
        log_sums = norms.at_temperature[rows]
        shift = (apart - common) / self.temperature + log_sums[:, :1] - log_sums[:, 1:]
        return d.sub_(shift.float())

    def terms(self, rows: slice, norms: _Norms, forward_share: float) -> "_Terms":
        """What all sums over a block's tokens are made of."""
        d = self.distances(rows, norms)
        p = self.log_probabilities(1, rows, norms).exp_()
        # A GPU would be waited for to be asked whether there are such; a processor is asked.
        has_far = d.is_cuda or bool(d.amax() > _FAR)
        q = None
        if has_far or forward_share < 1.0:
            q = self.log_probabilities(0, rows, norms).exp_()
        if not has_far:
            difference = d.expm1().mul_(p)
        else:
            assert q is not None
            difference = d.clamp_max(_FAR).expm1_().mul_(p)
            difference.mul_(d <= _FAR).addcmul_(q, (d > _FAR).to(q.dtype))
        return _Terms(p, q if forward_share < 1.0 else None, difference, d)

    def agree(self, rows: slice, norms: _Norms) -> Tensor:
        """`[r]` bool: whether some token here is a most likely one of both."""
        student, teacher = (
            logits[rows].float() - norms.largest[rows, side, None]
            for side, logits in enumerate(self.both)
        )
        # Of two numbers of which none is above 0, the sum is 0 where both are.
        return student.add_(teacher).amax(-1) == 0.0


def _norms(pair: _Pair, tp_group: dist.ProcessGroup) -> _Norms:
    largest = torch.stack([logits.amax(-1) for logits in pair.both], dim=1).float()
    if tp_group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
    temperatures = dict.fromkeys((pair.temperature, 1.0))
    sums = largest.new_empty(len(temperatures), *largest.shape, dtype=torch.float64)
    for rows in pair.blocks():
        for side, logits in enumerate(pair.both):
            shifted = logits[rows].float() - largest[rows, side, None]
            for number, temperature in enumerate(temperatures):
                # The plain sum is the last: its temporary may be the block itself.
                scaled = shifted if temperature == 1.0 else shifted / temperature
                sums[number, rows, side] = scaled.exp_().sum(-1).double()
    if tp_group.size() > 1:
        dist.all_reduce(sums, group=tp_group)
    sums.log_()
    return _Norms(largest, sums[0], sums[-1])


class _Terms(NamedTuple):
    """`[r, v]` fp32 each: p of the teacher, q of the student, q - p and d.

    Attributes:
        q: None where it is not asked for.
        difference: as exact as d is.
    """

    p: Tensor
    q: Tensor | None
    difference: Tensor
    d: Tensor


def _divergences(terms: _Terms, forward_share: float) -> Tensor:
    """`[r, 2]` fp32: what this rank's part of the vocabulary adds to KL(p, q) and KL(q, p).

    That of which there is no share is 0. The terms are lost.
    """
    p, q, difference, d = terms
    found = d.new_zeros(len(d), 2)
    if q is not None:
        found[:, 1] = q.mul_(d).sub_(difference).sum(-1)
    if forward_share > 0.0:
        found[:, 0] = difference.sub_(p.mul_(d)).sum(-1)
    return found


def _slope(terms: _Terms, reverse: Tensor, forward_share: float) -> Tensor:
    """`[r, v]`, the gradient by the student's logits over the temperature. The terms are lost.

    Args:
        reverse: `[r, 1]`, KL(q, p).
    """
    _, q, difference, d = terms
    if q is None:
        return difference
    slope = d.sub_(reverse).mul_(q).mul_(1.0 - forward_share)
    return slope.add_(difference, alpha=forward_share)
