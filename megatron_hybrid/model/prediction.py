"""Multi-token prediction: modules after the last layer that predict the tokens after the next.

The k-th module joins the hidden state of each token with the embedding of the k-th token after it,
runs layers of its own, and the model's output layer says what comes then (DeepSeek-V3, 2412.19437,
2.2). They are megatron-core's. What the engine rolls by itself comes from outside: it would roll
over the ends of context parallel parts as if no row of several documents were cut there.

Legend: s sequence (of this rank), b batch, h hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel as EngineHybridModel
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

# Of each module, the tokens that it reads and those that it is to predict, `[b, s]` int64 both.
Ahead = Sequence[tuple[Tensor, Tensor]]


class PredictionLayer(MultiTokenPredictionLayer):
    """The engine's, which is given the tokens that it reads: those k places on."""

    def _get_embeddings(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        embedding: Any,
        hidden_states: Tensor,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        """As the engine's, which would roll `input_ids`: their embeddings `[s, b, h]`."""
        embedded = embedding(input_ids=input_ids, position_ids=position_ids)
        hidden = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return input_ids, position_ids, padding_mask, embedded, hidden


class PredictingModel(EngineHybridModel):
    """A model whose prediction modules run where a forward pass asks for them, and else do not."""

    mtp_process: bool

    def forward(self, *arguments: Any, ahead: Ahead = (), **named: Any) -> Tensor:
        """The engine's; with `ahead`, on the last stage, losses of each module after the model's.

        Args:
            ahead: of each module.

        Returns:
            What the engine's forward does; with `ahead`, `[1 + modules, b, s]` of its losses.
        """
        if not self.mtp_process:
            output: Tensor = super().forward(*arguments, **named)
            return output
        kept: dict[str, Any] = {}

        def keep(_module: Any, _arguments: Any, given: dict[str, Any], output: Tensor) -> None:
            kept.update(given, hidden_states=output)

        hook = self.decoder.register_forward_hook(keep, with_kwargs=True)
        self.mtp_process = False  # else the engine runs them, in evaluations too
        try:
            output = super().forward(*arguments, **named)
        finally:
            self.mtp_process = True
            hook.remove()
        return torch.stack([output, *self._losses(ahead, kept)]) if ahead else output

    def _losses(self, ahead: Ahead, kept: dict[str, Any]) -> list[Tensor]:
        """`[b, s]` of each module.

        Args:
            kept: arguments of the stack of layers, and its output `[s, b, h]` as `hidden_states`.
        """
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        passed = {name: kept[name] for name in ("attention_mask", "packed_seq_params")}
        hidden, losses = kept["hidden_states"], []
        for layer, (tokens, labels) in zip(self.mtp.layers, ahead, strict=True):
            hidden, *_ = layer(
                input_ids=tokens,
                position_ids=None,
                hidden_states=hidden,
                rotary_pos_emb=kept["rotary_pos_emb"],
                embedding=self.embedding,
                **passed,
            )
            logits, _ = self.output_layer(hidden, weight=weight)
            losses.append(self.compute_language_model_loss(labels, logits))
        return losses
