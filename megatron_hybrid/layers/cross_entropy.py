"""Cross-entropy over a vocabulary that is sharded over TP, in one pass each way.

Legend: s sequence, b batch, v vocabulary of this TP rank; rows are the s * b tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Logits that are worked on at a time, so that temporaries stay in the processor's cache.
BLOCK_LOGITS = 2**19


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup
) -> Tensor:
    """-log softmax(logits)[label] of each token, computed in fp32.

    The gradient takes the place of the logits in memory, as with the engine's function of this
    name: the logits must not be used elsewhere, and backward can run once.

    Args:
        logits: `[s, b, v]`, fp32 or bf16; TP rank r holds the ids r * v to (r + 1) * v - 1.
        labels: `[s, b]` int64 ids of the whole vocabulary.

    Returns:
        `[s, b]` fp32, the same on every TP rank.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, tp_group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup
    ) -> Tensor:
        vocabulary = logits.shape[-1]
        rows = logits.view(-1, vocabulary)
        local = labels.reshape(-1) - tp_group.rank() * vocabulary
        elsewhere = (local < 0) | (local >= vocabulary)
        local = local.masked_fill(elsewhere, 0)[:, None]
        # Written into, rather than put together: what is kept of a block would lie where the next
        # one's temporaries could, and the heap grow with every block.
        log_sum = torch.empty(len(rows), device=rows.device)
        for block, sums in zip(_blocks(rows), _blocks(log_sum, vocabulary), strict=True):
            sums.copy_(block.float().logsumexp(-1))
        label_logit = rows.gather(1, local).squeeze(1).float().masked_fill_(elsewhere, 0.0)
        if tp_group.size() > 1:
            log_sum = _add_logs(log_sum, tp_group)
            dist.all_reduce(label_logit, group=tp_group)
        ctx.save_for_backward(rows, local, elsewhere, log_sum)
        return (log_sum - label_logit).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, local, elsewhere, log_sum = ctx.saved_tensors
        grad_rows = grad.reshape(-1, 1)
        at_label = (elsewhere[:, None].float() - 1.0) * grad_rows
        columns = (log_sum[:, None], grad_rows, local, at_label)
        for block, log_sums, grads, labels, of_label in zip(
            _blocks(rows), *(_blocks(column, rows.shape[1]) for column in columns), strict=True
        ):
            softmax = block.float().sub_(log_sums).exp_()  # fp32: the block itself
            softmax.mul_(grads).scatter_add_(1, labels, of_label)
            if softmax.dtype != block.dtype:
                block.copy_(softmax)
        return rows.view(*grad.shape, -1), None, None


def _blocks(rows: Tensor, vocabulary: int | None = None) -> tuple[Tensor, ...]:
    """Views of a few rows each, of about `BLOCK_LOGITS` logits."""
    return rows.split(max(1, BLOCK_LOGITS // (vocabulary or rows.shape[1])))


def _add_logs(log_sum: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """log of the sum over TP of exp(log_sum)."""
    largest = log_sum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
    total = (log_sum - largest).exp_()
    dist.all_reduce(total, group=tp_group)
    return total.log_().add_(largest)
