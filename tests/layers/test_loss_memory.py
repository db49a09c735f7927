"""Losses of a large vocabulary take the memory of a block of logits, whatever their number."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hybrid.testing import run_distributed

TOKENS, VOCABULARY = 256, 131072  # 64 MiB of logits in bf16, in 64 blocks
MOST_MIB = 48


def added_mib() -> list[float]:
    """On a rank: what forward and backward of each loss add to the process's peak, in MiB."""
    from megatron_hybrid.layers.cross_entropy import vocab_parallel_cross_entropy
    from megatron_hybrid.layers.kl_divergence import vocab_parallel_divergence

    group = dist.group.WORLD
    assert group is not None
    labels = torch.arange(TOKENS)[:, None]
    teacher = torch.randn(TOKENS, 1, VOCABULARY, dtype=torch.bfloat16)
    losses = (
        lambda logits, rows: vocab_parallel_cross_entropy(logits, labels[:rows], group),
        lambda logits, rows: (
            vocab_parallel_divergence(logits, teacher[:rows], labels[:rows], group).divergence
        ),
    )
    found = []
    for loss in losses:
        for rows in (4, TOKENS):  # the first time, for what is allocated once
            logits = torch.randn(rows, 1, VOCABULARY, dtype=torch.bfloat16).requires_grad_()
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before = peak_mib()
            torch.autograd.grad(loss(logits.view_as(logits), rows).sum(), logits)
            added = peak_mib() - before
        found.append(added)
    return found


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def test_memory() -> None:
    """Cross-entropy and divergence of bf16 logits: less than those take up themselves."""
    (found,) = run_distributed(added_mib, 1)
    assert max(found) < MOST_MIB, found
