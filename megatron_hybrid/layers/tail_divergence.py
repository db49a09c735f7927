"""KL divergence of a student from what was kept of a teacher: k likely tokens, and a tail.

With p the teacher and q the student, both at a temperature, what is compared are distributions over
k + 1 classes: k single tokens, which may be others for each token of text, and all that remain as
one. It is a lower bound of the divergence over all tokens (the log-sum inequality), and equal to it
where k is the whole vocabulary. Sums are those of `layers.kl_divergence`, of which no term is
negative; the gradient by a logit z of class c, of which the logit has the share w, is

    w (q_c - p_c) for the forward one,    w q_c (d_c - KL(q, p)) for the reverse one, d = log q/p

over the temperature, w being 1 for a single token.

Legend: s sequence, b batch, v vocabulary of this TP rank, k kept tokens; rows are the n = s * b
tokens, r of them a block.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.layers.kl_divergence import Divergence, row_blocks

# Below all logits and log-sums, and finite, so that it can be subtracted from itself.
_NOTHING = torch.finfo(torch.float32).min


class Kept(NamedTuple):
    """What is kept of a teacher.

    Attributes:
        ids: `[s, b, k]` int64 of the whole vocabulary, the likeliest first; -1: none.
        log_p: `[s, b, k]` fp32, their log-probabilities at the temperature; -inf: none.
        log_tail: `[s, b]` fp32, of all others together; -inf where there are none.
        loss: `[s, b]` fp32, the teacher's cross-entropy of the labels, in nats, at temperature 1.
    """

    ids: Tensor
    log_p: Tensor
    log_tail: Tensor
    loss: Tensor


def vocab_parallel_tail_divergence(
    student: Tensor,
    teacher: Kept,
    labels: Tensor,
    tp_group: dist.ProcessGroup,
    *,
    forward_share: float = 1.0,
    temperature: float = 1.0,
) -> Divergence:
    """Divergence of each token, computed in fp32, a few rows at a time, again in backward.

    Arguments, results and the memory of the student's logits are as of
    `layers.kl_divergence.vocab_parallel_divergence`, but for the teacher's.
    """
    found = _TailDivergence.apply(
        student, teacher.ids, teacher.log_p, teacher.log_tail, labels, tp_group, forward_share,
        temperature,
    )  # fmt: skip
    return Divergence(found[0], found[1], teacher.loss, found[2])


class _TailDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        ids: Tensor,
        log_p: Tensor,
        log_tail: Tensor,
        labels: Tensor,
        tp_group: dist.ProcessGroup,
        forward_share: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vocabulary, kept = student.shape[-1], ids.shape[-1]
        logits = student.view(-1, vocabulary)
        rows = ids.reshape(-1, kept)
        # The label beside them, whose cross-entropy is of all tokens.
        places = _local(
            torch.cat([rows, labels.reshape(-1, 1)], dim=1), vocabulary, tp_group.rank()
        )
        found = _at(logits, places, tp_group)
        top, at_label = found[:, :-1], found[:, -1]
        places = _Places(places.at[:, :-1], places.here[:, :-1])
        top = top.masked_fill(rows < 0, -torch.inf)
        rest = _log_sums(logits, places, tp_group, temperature)
        log_sum = torch.logaddexp((top / temperature).double().logsumexp(1), rest.others)
        log_q = torch.cat([(top / temperature).double(), rest.others[:, None]], dim=1)
        log_q -= log_sum[:, None]
        log_p = torch.cat([log_p.reshape(-1, kept), log_tail.reshape(-1, 1)], dim=1)
        divergence, slope = _classes(log_q, log_p.double(), forward_share)
        plain = log_sum
        if temperature != 1.0:
            plain = torch.logaddexp(top.double().logsumexp(1), rest.plain)
        loss = (plain - at_label.double()).float()
        largest = torch.maximum(top.amax(1), rest.largest)
        likeliest = (log_p[:, :-1] == log_p[:, :1]) & (rows >= 0)
        agree = ((top == largest[:, None]) & likeliest).any(1).float()
        label = _local(labels.reshape(-1, 1), vocabulary, tp_group.rank())
        ctx.save_for_backward(logits, *places, *label, slope, rest.others.float(), plain.float())
        ctx.temperature = temperature
        ctx.mark_non_differentiable(agree)
        ctx.set_materialize_grads(False)
        shape = labels.shape
        return divergence.view(shape), loss.view(shape), agree.view(shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_divergence: Tensor | None, of_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        logits, at, here, label_at, label_here, slope, others, plain = ctx.saved_tensors
        given = of_divergence if of_divergence is not None else of_loss
        if given is None:
            return (None,) * 8
        for rows in row_blocks(logits):
            grad: Tensor | None = None
            if of_divergence is not None:
                scale = of_divergence.reshape(-1, 1)[rows] / ctx.temperature
                block = _Places(at[rows], here[rows])
                # Zero where tokens are kept, each of which is a class of its own.
                grad = _without(logits[rows], block, ctx.temperature)
                grad.sub_(others[rows, None].clamp_min(_NOTHING)).exp_()
                grad.mul_(slope[rows, -1:] * scale)
                grad.scatter_add_(1, block.at, slope[rows, :-1] * scale * block.here)
            if of_loss is not None:
                scale = of_loss.reshape(-1, 1)[rows]
                of_labels = (logits[rows].float() - plain[rows, None]).exp_().mul_(scale)
                of_labels.scatter_add_(1, label_at[rows], -scale * label_here[rows])
                grad = of_labels if grad is None else grad.add_(of_labels)
            logits[rows] = grad
        return logits.view(*given.shape, -1), *[None] * 7


def keep(
    logits: Tensor,
    labels: Tensor,
    k: int,
    tp_group: dist.ProcessGroup,
    *,
    words: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    min_k: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What to keep of a teacher's logits; equal ones in the order of their ids.

    Args:
        logits: `[s, b, v]`, fp32 or bf16.
        labels: `[s, b]` int64.
        k: the most tokens that are kept; at most `words`.
        words: of the vocabulary, without its padding.
        top_p: keep no more than what together has this probability, but `min_k` tokens; None: k.

    Returns:
        ids `[s, b, k]` int64, -1 where none; values `[s, b, k]` of the logits' dtype; `[s, b]` fp32
        each: the log of the sum of exp(logit / temperature), the log-probability of all that is not
        kept, and the cross-entropy of the labels.
    """
    shape, vocabulary = labels.shape, logits.shape[-1]
    wide, first = logits.reshape(-1, vocabulary), tp_group.rank() * vocabulary
    here = wide[:, : max(0, min(vocabulary, words - first))]
    values, ids = here.topk(min(k, here.shape[1]), dim=1)
    values, ids = _gathered(*_in_order(values, ids + first), k, tp_group)
    log_sum, plain = _whole_sums(wide, tp_group, temperature)
    if top_p is not None:
        p = ((values.double() / temperature) - log_sum[:, None]).exp()
        enough = p.cumsum(1) - p >= top_p
        enough[:, :min_k] = False
        ids = ids.masked_fill(enough, -1)
    places = _local(ids, vocabulary, tp_group.rank())
    others = _log_sums(wide, places, tp_group, temperature).others
    label = _at(wide, _local(labels.reshape(-1, 1), vocabulary, tp_group.rank()), tp_group)[:, 0]
    found = log_sum, others - log_sum, plain - label.double()
    # Padding of the vocabulary is far below all of it.
    tail = found[1].masked_fill(found[1] < -1e20, -torch.inf)
    return (
        ids.view(*shape, -1), values.view(*shape, -1),
        found[0].float().view(shape), tail.float().view(shape), found[2].float().view(shape),
    )  # fmt: skip


class _Places(NamedTuple):
    """Tokens of the vocabulary in this rank's part of it, `[n, k]` each: index, and whether it is
    here; of one that is not, the index is 0."""

    at: Tensor
    here: Tensor


class _Rest(NamedTuple):
    """Of all tokens but some, `[n]` each: log-sums of exp at the temperature and at 1, float64, and
    the largest logit, fp32."""

    others: Tensor
    plain: Tensor
    largest: Tensor


def _local(ids: Tensor, vocabulary: int, rank: int) -> _Places:
    local = ids - rank * vocabulary
    here = (ids >= 0) & (local >= 0) & (local < vocabulary)
    return _Places(local.masked_fill(~here, 0), here)


def _at(logits: Tensor, places: _Places, tp_group: dist.ProcessGroup) -> Tensor:
    """`[n, k]` fp32 logits of tokens, wherever they are; 0 of none."""
    found = logits.gather(1, places.at).float().masked_fill_(~places.here, 0.0)
    if tp_group.size() > 1:
        dist.all_reduce(found, group=tp_group)
    return found


def _without(logits: Tensor, places: _Places, temperature: float) -> Tensor:
    """`[r, v]` fp32, over the temperature, -inf at the places."""
    found = logits.float() if logits.dtype != torch.float32 else logits.clone()
    if temperature != 1.0:
        found.div_(temperature)
    mask = torch.where(places.here, -torch.inf, torch.inf)
    return found.scatter_reduce_(1, places.at, mask, "amin")


def _log_sums(
    logits: Tensor, places: _Places, tp_group: dist.ProcessGroup, temperature: float
) -> _Rest:
    """Over all tokens but those at the places."""
    rows = len(logits)
    largest = logits.new_full((rows,), _NOTHING, dtype=torch.float32)
    sums = logits.new_zeros((2, rows), dtype=torch.float64)
    for block in row_blocks(logits):
        rest = _without(logits[block], _Places(*(each[block] for each in places)), 1.0)
        largest[block] = rest.amax(1).clamp_min(_NOTHING)
        rest.sub_(largest[block, None])
        if temperature != 1.0:
            sums[1, block] = rest.exp().sum(1).double()
            rest.div_(temperature)
        sums[0, block] = rest.exp_().sum(1).double()
    return _Rest(*_over_ranks(largest, sums, tp_group, temperature))


def _whole_sums(
    logits: Tensor, tp_group: dist.ProcessGroup, temperature: float
) -> tuple[Tensor, Tensor]:
    """Over all tokens: at the temperature and at 1, `[n]` float64."""
    none = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    found = _log_sums(logits, _Places(none, none.bool()), tp_group, temperature)
    return found.others, found.plain


def _over_ranks(
    largest: Tensor, sums: Tensor, tp_group: dist.ProcessGroup, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    whole = largest
    if tp_group.size() > 1:
        whole = largest.clone()
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=tp_group)
        lower = (largest - whole).double()
        sums = sums * torch.stack([(lower / temperature).exp(), lower.exp()])
        dist.all_reduce(sums, group=tp_group)
    others = sums[0].log() + whole.double() / temperature
    plain = others if temperature == 1.0 else sums[1].log() + whole.double()
    return others, plain, whole


def _gathered(
    values: Tensor, ids: Tensor, k: int, tp_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The largest k of all ranks' largest."""
    size = tp_group.size()
    if size > 1:
        # Ranks may have less than k each, and the last ones fewer words.
        room = k - values.shape[1]
        values = torch.nn.functional.pad(values, (0, room), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, room), value=-1)
        parts = [[torch.empty_like(each) for _ in range(size)] for each in (values, ids)]
        dist.all_gather(parts[0], values.contiguous(), group=tp_group)
        dist.all_gather(parts[1], ids.contiguous(), group=tp_group)
        values, ids = _in_order(torch.cat(parts[0], dim=1), torch.cat(parts[1], dim=1))
    return values[:, :k], ids[:, :k]


def _in_order(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The largest first, equal ones by their ids."""
    ids, order = ids.sort(dim=1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _classes(log_q: Tensor, log_p: Tensor, forward_share: float) -> tuple[Tensor, Tensor]:
    """The divergence `[n]` over classes `[n, k + 1]`, and its gradient by the logits' log-shares.

    In float64; the results are fp32. A class that neither has, such as none of the kept, adds
    nothing.
    """
    p, q = log_p.exp(), log_q.exp()
    d = log_q.clamp_min(_NOTHING) - log_p.clamp_min(_NOTHING)
    there = (p > 0) | (q > 0)
    # q - p, as exact as d is where the two are near.
    difference = torch.where(d.abs() < 1.0, p * d.expm1(), q - p)
    forward = torch.where(there, difference - p * torch.where(p > 0, d, 0.0), 0.0).sum(1)
    if forward_share == 1.0:
        return forward.float(), difference.float()
    towards = torch.where(q > 0, d, 0.0)
    reverse = torch.where(there, q * towards - difference, 0.0).sum(1)
    slope = forward_share * difference + (1.0 - forward_share) * q * (towards - reverse[:, None])
    found = forward_share * forward + (1.0 - forward_share) * reverse
    return found.float(), slope.float()
