"""The torch backend's functions under the signatures of those of the engine that they replace.

What they call is imported in them: layers stand above the platform, which is there first.
"""

from __future__ import annotations

from typing import Any

import torch


def final_norm(config: Any, hidden_size: int, eps: float) -> torch.nn.Module:
    """The torch backend's norm, for the one norm that the hybrid stack builds by name."""
    from megatron_hybrid.layers.norm import RMSNorm

    return RMSNorm(config, hidden_size, eps)


def parallel_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[torch.Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    tp_group: torch.distributed.ProcessGroup | None = None,
    gtp_remat_size: int = 1,
) -> torch.Tensor:
    """The torch backend's product, for every parallel linear of the engine."""
    from megatron_hybrid.layers.linear import parallel_linear

    del wgrad_deferral_limit
    assert not gradient_accumulation_fusion and grad_output_buffer is None and gtp_remat_size == 1
    return parallel_linear(
        input,
        weight,
        bias,
        allreduce_dgrad=allreduce_dgrad,
        sequence_parallel=sequence_parallel,
        tp_group=tp_group,
    )


def cross_entropy(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """The torch backend's cross-entropy, for the engine's language models."""
    from megatron_hybrid.layers.cross_entropy import vocab_parallel_cross_entropy

    assert label_smoothing == 0.0 and tp_group is not None
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group)
