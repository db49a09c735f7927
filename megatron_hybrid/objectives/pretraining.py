"""Pre-training: the next token of every document."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_hybrid.objectives.base import Losses, Objective

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.batch import Batch


class Pretraining(Objective):
    """Mean cross-entropy over the tokens whose next token is of the same document."""

    next_tokens = True
    is_cross_entropy = True

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """Where a token sees the next one, there is nothing to predict."""
        if config.model.attn_mask_type != "causal":
            yield (
                f"training.objective=pretraining needs model.attn_mask_type=causal; it is "
                f"{config.model.attn_mask_type}"
            )

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        return Losses(output, batch.loss_mask)
