"""Supervised fine-tuning: the next token of what the assistant says in conversations."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron_hybrid.objectives.base import Losses, Objective

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.data.batch import Batch


class SupervisedFineTuning(Objective):
    """Mean cross-entropy over the tokens that the masks of conversations name.

    A sample is a row of whole conversations, none of which sees another: attention, positions and
    SSM state start anew at each.
    """

    next_tokens = True
    is_cross_entropy = True
    conversations = True

    @classmethod
    def problems(cls, config: "RunConfig", options: Any) -> Iterator[str]:
        """Other samples than rows of one length, and layers that would see across them."""
        name, data = f"training.objective={config.training.objective}", config.data
        if config.model.attn_mask_type != "causal":
            yield (f"{name} needs model.attn_mask_type=causal; it is {config.model.attn_mask_type}")
        if data.mock_data:
            yield (
                f"{name} reads conversations, which made-up tokens are not; data.mock_data must be "
                "false"
            )
        if data.sample_order != "plan":
            yield f"{name} needs data.sample_order=plan; it is {data.sample_order}"
        if not data.packed_documents:
            yield (
                f"{name} puts several conversations into a sample, between which attention and SSM "
                "state start anew; data.packed_documents must be true"
            )
        if data.block_tokens is not None:
            yield (
                f"{name} shuffles its samples one by one; data.block_tokens={data.block_tokens} "
                "must be null"
            )
        for number, phase in enumerate(data.phases):
            if phase.seq_length not in (None, data.seq_length):
                yield (
                    f"{name} puts conversations into samples of one length; "
                    f"data.phases[{number}].seq_length={phase.seq_length} must be null or "
                    f"data.seq_length={data.seq_length}"
                )

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        return Losses(output, batch.loss_mask)

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """How many tokens of the step were learnt; the others were read only."""
        return {"learnt_tokens": count}
