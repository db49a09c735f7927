"""Pre-training: the next token of every document."""

from typing import TYPE_CHECKING

from megatron_hybrid.objectives.base import Losses, Objective

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_hybrid.data.batch import Batch


class Pretraining(Objective):
    """Mean cross-entropy over the tokens whose next token is of the same document."""

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        return Losses(output, batch.loss_mask)
