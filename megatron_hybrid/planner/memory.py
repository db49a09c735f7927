"""The memory of each pipeline stage: what its fullest rank holds at its fullest moment."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.layers import Sort
from megatron_hybrid.config.linears import expert_width, value_channels
from megatron_hybrid.config.pattern import ATTENTION, MOE
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.planner.activations import (
    dropout_mask,
    layer_activations,
    layer_input,
    output_activations,
    prediction_activations,
)
from megatron_hybrid.planner.frozen import frozen_memory
from megatron_hybrid.planner.layer_time import Features
from megatron_hybrid.planner.layout import Layout, chunk_sorts, layout_of
from megatron_hybrid.planner.parameters import stage_parameters
from megatron_hybrid.planner.schedule import chunks_in_flight


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage.

    Attributes:
        stage: from 0.
        layers: pattern text of its chunks.
        parameter_count: how many parameters the rank holds.
        parameters, gradients, optimizer_state: of those.
        activations: of all micro batches in flight, and of what is computed again at a time.
        logits: of the last stage's loss.
        communication: tensors on their way between ranks.
        frozen: of models that run forward beside the one that is trained.
    """

    stage: int
    layers: tuple[str, ...]
    parameter_count: int
    parameters: int
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    communication: int
    frozen: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, name) for name in PARTS)


PARTS = (
    "parameters", "gradients", "optimizer_state", "activations", "logits", "communication",
    "frozen",
)  # fmt: skip


def rank_memory(
    config: RunConfig, world_size: int, *, fused: bool, features: Features | None = None
) -> tuple[StageMemory, ...]:
    """The memory of each stage of a valid config on `world_size` ranks.

    Args:
        fused: on the transformer_engine backend; else on torch's.
        features: of a run that is not ours; null: what the config says.
    """
    layout = layout_of(config, world_size)
    features = features or Features.of(config)
    return tuple(_stage(config, layout, stage, features, fused=fused) for stage in range(layout.pp))


def _stage(
    config: RunConfig, layout: Layout, stage: int, features: Features, *, fused: bool
) -> StageMemory:
    model, precision = config.model, config.precision
    number = 4 if precision.weights == "fp32" else 2
    held = stage_parameters(model, layout, stage)
    fp8_weights = fused and precision.fp8_param_gather
    weights = 1 if fp8_weights else number
    master = 0 if number == 4 else 4
    # Main parameters of 16-bit ones, and two moments, each divided over those that share them.
    shared = held.dense * (master + 8) + held.fp32 * 8
    optimizer = shared // layout.shards + held.expert * (master + 8) // layout.expert_shards
    activations, logits = _activations(config, layout, stage, features, number=number, fused=fused)
    return StageMemory(
        stage=stage,
        layers=layout.stage_chunks(stage),
        parameter_count=held.total,
        parameters=weights * (held.dense + held.expert) + 4 * held.fp32,
        gradients=features.gradient_bytes * held.total,
        optimizer_state=optimizer,
        activations=activations,
        logits=logits,
        communication=_communication(config, layout, stage, number=number),
        frozen=frozen_memory(config, layout, stage, fused=fused),
    )


def _activations(
    config: RunConfig, layout: Layout, stage: int, features: Features, *, number: int, fused: bool
) -> tuple[int, int]:
    """Of the layers, and of the loss.

    In flight are as many passes of each chunk as the schedule has begun and not ended.
    """
    model = config.model
    kept, again = [], [0]
    for index, chunk in enumerate(chunk_sorts(model, layout)[stage :: layout.pp]):
        of_chunk, made_again = _chunk(config, layout, chunk, features, number=number, fused=fused)
        if stage == index == 0:
            of_chunk += dropout_mask(model, layout, number_bytes=number, fused=fused)
        kept.append(of_chunk)
        again.append(made_again)
    flying = chunks_in_flight(layout.pp, layout.vpp, layout.micro_batches, stage, kept)
    total = sum(count * size for count, size in zip(flying, kept, strict=True))
    logits = 0
    if stage == layout.pp - 1:
        logits = output_activations(model, layout, number_bytes=number, fused=fused)
        # They run after all layers, and begin the backward pass.
        full = config.training.recompute_granularity == "full"
        of_modules, made_again = prediction_activations(
            model, layout, number_bytes=number, fused=fused, recompute=features.recompute, full=full
        )
        logits += of_modules
        again.append(made_again)
    return total + max(again), logits


def _chunk(
    config: RunConfig,
    layout: Layout,
    chunk: Sequence[Sort],
    features: Features,
    *,
    number: int,
    fused: bool,
) -> tuple[int, int]:
    """What a forward pass of a chunk keeps, and what is made again at a time in the backward."""
    training = config.training

    def sizes(recompute: tuple[str, ...]) -> list[int]:
        of_sort = {
            sort.name: layer_activations(
                sort.model,
                sort.kind,
                layout,
                number_bytes=number,
                fused=fused,
                fp8=fused and config.precision.recipe in FLOAT8_RECIPES,
                recompute=recompute,
            )
            for sort in {sort.name: sort for sort in chunk}.values()
        }
        return [of_sort[sort.name] for sort in chunk]

    whole = sizes(())
    if training.recompute_granularity != "full":
        rest = sizes(features.recompute)
        return sum(rest), max(all_of - kept for all_of, kept in zip(whole, rest, strict=True))
    again = layer_input(config.model, layout, number_bytes=number)
    group = training.recompute_num_layers or 1
    if training.recompute_method == "block":
        return again * min(group, len(whole)) + sum(whole[group:]), max(whole[:group])
    groups = [sum(whole[i : i + group]) for i in range(0, len(whole), group)]
    return again * len(groups), max(groups)


def _communication(config: RunConfig, layout: Layout, stage: int, *, number: int) -> int:
    """What is on its way between ranks at once: the most that one layer needs, and the pipeline's.

    Received hidden states and their gradients; the sequence gathered over TP; the copies of tokens
    that are sent to experts on other ranks (what is received is their activation); the next keys
    and values of CP's ring, sent and received. Gradients are reduced and parameters gathered in the
    buffers that are counted already.
    """
    d = config.model.hidden_size
    ends = (stage > 0) + (stage < layout.pp - 1)
    between = 2 * ends * number * layout.own_tokens * d
    gathered = number * layout.tokens * d if layout.sequence_parallel and layout.tp > 1 else 0
    on_way = [gathered]
    for chunk in chunk_sorts(config.model, layout)[stage :: layout.pp]:
        for sort in chunk:
            model = sort.model
            if layout.ep > 1 and sort.kind == MOE:
                on_way.append(
                    number * layout.own_tokens * model.moe_router_topk * expert_width(model)
                )
            if layout.cp > 1 and sort.has(ATTENTION):
                assert model.num_query_groups is not None and model.kv_channels is not None
                channels = model.kv_channels + value_channels(model, sort.kind)
                width = max(model.num_query_groups // layout.tp, 1) * channels
                on_way.append(2 * number * layout.tokens * width)
    return between + max(on_way)
