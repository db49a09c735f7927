"""RMSNorm of the torch backend, under sequence parallelism.

Legend: s sequence (of this rank), b batch, h hidden size, d channels of the Mamba mixer.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_hybrid.ops.gated_norm import rms_norm_grouped
from megatron_hybrid.platform import initialize


def parameter_device(config: TransformerConfig) -> torch.device | None:
    """Where a layer makes its parameters; None for torch's default, which may be "meta"."""
    return None if config.use_cpu_initialization else initialize().device


def norm_weight(config: TransformerConfig, size: int, sequence_parallel: bool) -> nn.Parameter:
    """A norm's weight `[size]`, ones; marked so that the engine adds up its gradient over TP."""
    weight = nn.Parameter(
        torch.ones(size, dtype=config.params_dtype, device=parameter_device(config))
    )
    # Each TP rank has seen other tokens: finalize_model_grads sums the gradients of such weights.
    weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
    return weight


class RMSNorm(nn.Module):
    """RMSNorm over the hidden size (what TENorm is for the Transformer Engine backend).

    Forward: `[s, b, h]` -> `[s, b, h]`, same dtype; statistics in fp32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = self._weight(config, hidden_size)
        self.eps = eps

    def _weight(self, config: TransformerConfig, size: int) -> nn.Parameter:
        return norm_weight(config, size, config.sequence_parallel)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm_grouped(hidden_states, self.weight, self.weight.numel(), self.eps)


class WholeRMSNorm(RMSNorm):
    """RMSNorm of what every TP rank has of all tokens, whose gradient each has whole."""

    def _weight(self, config: TransformerConfig, size: int) -> nn.Parameter:
        return norm_weight(config, size, sequence_parallel=False)


class GroupedRMSNorm(nn.Module):
    """RMSNorm in groups of channels, after the gate of a Mamba-2 mixer; channels sharded over TP.

    Args:
        size: channels of this TP rank.
        group_size: channels that are normalised together; a group never spans TP ranks.

    Forward: `[s, b, d]` -> `[s, b, d]`, same dtype.
    """

    def __init__(
        self,
        config: TransformerConfig,
        size: int,
        group_size: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.weight = norm_weight(config, size, sequence_parallel=False)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.group_size = group_size
        self.eps = eps
        self.tp_group = tp_group

    def forward(self, y: Tensor) -> Tensor:
        return rms_norm_grouped(y, self.weight, self.group_size, self.eps)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The weight, sharded over TP along its only axis."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ShardedRMSNorm(GroupedRMSNorm):
    """RMSNorm over channels of which each TP rank has a part.

    Args:
        size: channels of this TP rank.
        eps: added to the mean square over those of all ranks.

    Forward: `[s, b, d]` -> `[s, b, d]`, same dtype; statistics in fp32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        size: int,
        eps: float,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config, size, size, eps, tp_group)

    def forward(self, y: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return super().forward(y)
        normed: Tensor = _ShardedRMSNorm.apply(y, self.weight, self.eps, self.tp_group)
        return normed


class _ShardedRMSNorm(torch.autograd.Function):
    """As `ops.gated_norm` has it of one group, whose sums are over ranks."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weight: Tensor, eps: float, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True).div_(y.shape[-1] * group.size())
        torch.distributed.all_reduce(mean, group=group)
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(y, weight, inverse)
        ctx.group = group
        return (wide * inverse).mul_(weight).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, inverse = ctx.saved_tensors
        normed, wide = y.to(inverse.dtype) * inverse, grad.to(inverse.dtype)
        grad_weight = (wide * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = wide * weight
        mean = (grad_normed * normed).sum(-1, keepdim=True).div_(y.shape[-1] * ctx.group.size())
        torch.distributed.all_reduce(mean, group=ctx.group)
        grad_y = grad_normed.sub_(normed.mul_(mean)).mul_(inverse)
        return grad_y.to(y.dtype), grad_weight, None, None
