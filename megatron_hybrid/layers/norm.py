"""RMSNorm of the torch backend, under sequence parallelism.

Legend: s sequence (of this rank), b batch, h hidden size, d channels of the Mamba mixer.
"""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

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
        self.weight = norm_weight(config, hidden_size, config.sequence_parallel)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm_grouped(hidden_states, self.weight, self.weight.numel(), self.eps)


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
