"""megatron-core's hybrid model, with the torch backend's parts where it builds its own by name.

Legend: s sequence (of this rank), b batch, v vocabulary of this TP rank.
"""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack as EngineHybridStack
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.cross_entropy import vocab_parallel_cross_entropy
from megatron_hybrid.layers.linear import parallel_linear
from megatron_hybrid.layers.norm import RMSNorm
from megatron_hybrid.model.prediction import PredictingModel


class HybridStack(EngineHybridStack):
    """The engine's stack of layers; the norm at its end needs no Transformer Engine."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: Any,
        *,
        post_process: bool = True,
        post_layer_norm: bool = True,
        **others: Any,
    ) -> None:
        super().__init__(
            config, submodules, post_process=post_process, post_layer_norm=False, **others
        )
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class HybridModel(PredictingModel):
    """The engine's model, with our products of matrices and our cross-entropy at its end."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.post_process:
            self.output_layer._forward_impl = parallel_linear

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token, in nats.

        Args:
            labels: `[b, s]` int64.
            logits: `[s, b, v]`; their memory is used for the gradient.

        Returns:
            `[b, s]` fp32.
        """
        losses = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), self.tp_group)
        return losses.t().contiguous()
