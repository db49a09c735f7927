"""A norm and the column-parallel linear after it, as one module: `linear.layer_norm_weight`.

Legend: s sequence (of this rank), b batch, h hidden size, o output size of this TP rank.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_hybrid.layers.norm import norm_weight
from megatron_hybrid.ops.gated_norm import rms_norm_grouped


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear` for any device: RMSNorm, then the engine's linear.

    Parameters and checkpoint keys have Transformer Engine's names (`layer_norm_weight`, `weight`,
    `bias`). The norm runs on this rank's part of the sequence, before the all-gather of sequence
    parallelism.

    Forward: `[s, b, h]` -> (`[s * TP, b, o]` with sequence parallelism, else `[s, b, o]`; bias).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        **linear_arguments: Any,
    ) -> None:
        super().__init__(
            input_size, output_size, config=config, init_method=init_method, **linear_arguments
        )
        self.layer_norm_weight = norm_weight(config, input_size, config.sequence_parallel)
        self.eps = config.layernorm_epsilon

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        normed = rms_norm_grouped(
            hidden_states, self.layer_norm_weight, self.layer_norm_weight.numel(), self.eps
        )
        return super().forward(normed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """`weight` and `bias` sharded along their first axis, `layer_norm_weight` replicated."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
