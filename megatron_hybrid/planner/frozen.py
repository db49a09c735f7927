"""What frozen models add to a plan: those that run forward beside the one that is trained."""

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.objectives.registry import frozen_models
from megatron_hybrid.planner.activations import layer_activations, layer_input
from megatron_hybrid.planner.layout import Layout, chunk_sorts, layout_of
from megatron_hybrid.planner.parameters import stage_parameters
from megatron_hybrid.teachers.config import shares_groups


def frozen_memory(config: RunConfig, layout: Layout, stage: int, *, fused: bool) -> int:
    """Bytes on a rank of a stage of the model that is trained.

    Of each frozen model: its weights, what one layer at a time makes of a micro batch, and on the
    last stage the hidden states that wait for the pipeline, and the logits made of them.

    Args:
        layout: of the model that is trained.
    """
    total = 0
    for frozen in frozen_models(config):
        theirs, model = layout_of(frozen, layout.world_size), frozen.model
        number = 4 if frozen.precision.weights == "fp32" else 2
        together = shares_groups(config, frozen)
        # In a layout of its own any of its stages may be on a rank of this one.
        stages = [stage] if together else range(theirs.pp)
        held = [stage_parameters(model, theirs, each) for each in stages]
        weights = max(number * (each.dense + each.expert) + 4 * each.fp32 for each in held)
        fp8 = fused and frozen.precision.recipe in FLOAT8_RECIPES
        layers = {sort.name: sort for chunk in chunk_sorts(model, theirs) for sort in chunk}
        passing = max(
            layer_activations(
                sort.model, sort.kind, theirs, number_bytes=number, fused=fused, fp8=fp8,
                recompute=(),
            )
            for sort in layers.values()
        )  # fmt: skip
        total += weights + passing + 2 * layer_input(model, theirs, number_bytes=number)
        if stage == layout.pp - 1:
            assert config.model.padded_vocab_size is not None
            words = config.model.padded_vocab_size // layout.tp
            waiting = 1 if together and theirs.pp == 1 else layout.micro_batches
            total += number * layout.tokens * (waiting * model.hidden_size + words)
            total += 0 if together else number * words * model.hidden_size
    return total
