"""How long a training step takes on a cluster: matrix products at the speed of the format, the rest
at the speed of memory, communication at that of the links, and the pipeline by simulation.

Data sheets, and shares of them that were calibrated on published runs (`hardware.py`,
`published.yaml`). Of communication: TP's is on the path (no overlap with products, unless a run has
it); CP's exchange of keys and values runs beside attention; gradients are reduced beside the last
backward passes and parameters gathered beside the first forward passes where `overlap_grad_reduce`
and `overlap_param_gather` say so, else on the path.
"""

from dataclasses import dataclass

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.linears import Linear
from megatron_hybrid.config.pattern import ATTENTION, MLP, MOE, made_of
from megatron_hybrid.config.precision import float8_layers
from megatron_hybrid.objectives.registry import frozen_models, step_flops_per_token
from megatron_hybrid.planner.hardware import SHARES, Gpu, Shares
from megatron_hybrid.planner.layer_time import NUMBER_BYTES, Features, Rank, Work
from megatron_hybrid.planner.layout import Layout, chunk_sorts, layout_of
from megatron_hybrid.planner.parameters import stage_parameters
from megatron_hybrid.planner.schedule import simulate


@dataclass(frozen=True)
class StepTime:
    """A predicted step.

    Attributes:
        seconds: of the whole step.
        tokens: that it trains on.
        parts: cause -> seconds of an average rank; they add up to the step.
        mfu: model FLOPs over what the GPUs' peak in BF16 would do.
        bubble: share of the step in which an average rank waits for its pipeline.
    """

    seconds: float
    tokens: int
    parts: dict[str, float]
    mfu: float

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.seconds

    @property
    def bubble(self) -> float:
        return self.parts["pipeline bubble"] / self.seconds

    @property
    def exposed_communication(self) -> float:
        """Share of the step that waits for transfers between ranks."""
        names = ("TP transfers", "CP transfers", "EP transfers", "gradients and parameters")
        return sum(self.parts[name] for name in names) / self.seconds


def chunk_work(rank: Rank) -> list[tuple[Work, Work]]:
    """One micro batch through each pipeline segment, forward and backward."""
    config, layout = rank.config, rank.layout
    in_fp8 = set(float8_layers(config))
    chunks = chunk_sorts(config.model, layout)
    ranks = {sort.name: rank.of_sizes(sort.model) for chunk in chunks for sort in chunk}
    known = {
        (sort.name, fp8): ranks[sort.name].layer(sort.kind, fp8=fp8)
        for sort in {sort.name: sort for chunk in chunks for sort in chunk}.values()
        for fp8 in (False, True)
    }
    found, number = [], 0
    for chunk in chunks:
        forward = backward = Work()
        for place, sort in enumerate(chunk):
            number += 1
            one, other = known[sort.name, number in in_fp8]
            forward += one
            backward += other
            again = recomputed_seconds(
                ranks[sort.name], sort.kind, place, one, fp8=number in in_fp8
            )
            backward += Work(recomputed=again)
        found.append((forward, backward))
    first_forward, first_backward, last_forward, last_backward = rank.ends()
    found[0] = (found[0][0] + first_forward, found[0][1] + first_backward)
    found[-1] = (found[-1][0] + last_forward, found[-1][1] + last_backward)
    for _ in range(config.model.mtp_num_layers or 0):
        forward, backward = prediction_work(rank)
        found[-1] = (
            found[-1][0] + forward + first_forward + last_forward,
            found[-1][1] + backward + first_backward + last_backward,
        )
    return found


def prediction_work(rank: Rank) -> tuple[Work, Work]:
    """One micro batch through a module of multi-token prediction but for its embedding and its end,
    forward and backward."""
    model, layout = rank.model, rank.layout
    d, full = model.hidden_size, rank.config.training.recompute_granularity == "full"
    products = rank.product(layout.tokens, Linear(2 * d, d // layout.tp), fp8=False)
    # Two norms, and what they give joined.
    moved = rank.moved(8 * NUMBER_BYTES * layout.own_tokens * d)
    forward, backward = Work(products, memory=moved), Work(2 * products, memory=2 * moved)
    for place, kind in enumerate(model.mtp_hybrid_override_pattern or ""):
        one, other = rank.layer(kind, fp8=False)
        again = 0.0 if full else recomputed_seconds(rank, kind, place, one, fp8=False)
        forward, backward = forward + one, backward + other + Work(recomputed=again)
    return forward, backward + Work(recomputed=forward.seconds if full else 0.0)


def recomputed_seconds(rank: Rank, kind: str, place: int, forward: Work, *, fp8: bool) -> float:
    """What the backward pass computes again of a layer, the `place`-th of its chunk."""
    training, modules = rank.config.training, rank.features.recompute
    if training.recompute_granularity == "full":
        first = training.recompute_num_layers or 1
        return forward.seconds if training.recompute_method != "block" or place < first else 0.0
    if {MOE: "moe", MLP: "mlp"}.get(kind) in modules:
        return forward.seconds
    seconds = 0.0
    if "layernorm" in modules:
        seconds += rank.moved(2 * NUMBER_BYTES * rank.layout.own_tokens * rank.model.hidden_size)
    if ATTENTION in made_of(kind) and "core_attn" in modules:
        seconds += forward.attention_and_scan
    if kind == MOE and "shared_experts" in modules:
        seconds += rank.shared_experts(fp8=fp8)
    return seconds


def transfer_seconds(rank: Rank) -> float:
    """Of a micro batch's hidden states to the next stage."""
    hidden = NUMBER_BYTES * rank.layout.own_tokens * rank.model.hidden_size
    return hidden / rank.bandwidth(rank.layout.world_size)


def step_time(
    config: RunConfig,
    world_size: int,
    gpu: Gpu,
    features: Features | None = None,
    shares: Shares = SHARES,
) -> StepTime:
    """Predict a step of a valid config on `world_size` GPUs.

    Args:
        features: of a run that is not ours; null: what the config says.
    """
    layout = layout_of(config, world_size)
    rank = Rank(config, layout, gpu, features, shares)
    chunks = chunk_work(rank)
    passes = _pipeline_seconds(chunks, layout, transfer_seconds(rank))
    total = sum((forward + backward for forward, backward in chunks), Work())
    mean = total.times(layout.micro_batches / layout.pp)
    reduced, updated = _update(rank, chunks)
    frozen = _frozen_seconds(config, world_size, gpu, shares)
    seconds = passes + reduced + updated + frozen
    parts = {
        "matrix products": mean.products,
        "attention and scan": mean.attention_and_scan,
        "memory-bound": mean.memory,
        "host-bound": mean.launches,
        "computed again": mean.recomputed,
        "TP transfers": mean.tensor_parallel,
        "CP transfers": mean.context_parallel,
        "EP transfers": mean.expert_parallel,
        "pipeline bubble": max(0.0, passes - mean.seconds),  # it may round below
        "gradients and parameters": reduced,
        "optimizer": updated,
        "frozen models": frozen,
    }
    text_tokens = layout.seq_length - config.model.num_meta_tokens
    tokens = config.training.global_batch_size * text_tokens
    flops = step_flops_per_token(config, text_tokens) * tokens
    mfu = flops / (seconds * world_size * gpu.bf16_tflops * 1e12)
    return StepTime(seconds, tokens, parts, mfu)


def _frozen_seconds(config: RunConfig, world_size: int, gpu: Gpu, shares: Shares) -> float:
    """Of the forward passes of models that run beside the one that is trained."""
    total = 0.0
    for frozen in frozen_models(config):
        layout = layout_of(frozen, world_size)
        rank = Rank(frozen, layout, gpu, shares=shares)
        stages = [forward.seconds for forward, _ in chunk_work(rank)]
        slowest = max(stages) + (transfer_seconds(rank) if layout.pp > 1 else 0.0)
        total += sum(stages) + (layout.micro_batches - 1) * slowest
    return total


def _pipeline_seconds(chunks: list[tuple[Work, Work]], layout: Layout, transfer: float) -> float:
    """Of a step's passes. After the first ones each further round of micro batches takes as long as
    the one before it, so that no more than four rounds are simulated.
    """
    forward, backward = ([work.seconds for work in each] for each in zip(*chunks, strict=True))
    pp, count = layout.pp, layout.micro_batches
    if pp == 1:
        return count * (sum(forward) + sum(backward))

    def seconds(micro_batches: int) -> float:
        return simulate(forward, backward, pp, micro_batches, transfer=transfer).seconds

    rounds, rest = divmod(count, pp)
    if rounds <= 4:
        return seconds(count)
    most = 3 * pp + rest
    return seconds(most) + (rounds - 3) * (seconds(most) - seconds(most - pp))


def _update(rank: Rank, chunks: list[tuple[Work, Work]]) -> tuple[float, float]:
    """Seconds that gradients and parameters are on their way, unhidden; and of the optimizer."""
    config, layout = rank.config, rank.layout
    stages = [stage_parameters(config.model, layout, stage) for stage in range(layout.pp)]
    most = max(stages, key=lambda held: held.total)
    # Ranks of other tensor and expert parallel ranks lie between those that share a parameter.
    speed = rank.replica_bandwidth(layout.shards, layout.tp)
    expert_speed = rank.replica_bandwidth(layout.expert_shards, layout.ep * layout.etp)
    dense = (most.dense + most.fp32) * (layout.shards - 1) / layout.shards / speed
    expert = most.expert * (layout.expert_shards - 1) / layout.expert_shards / expert_speed
    reduce, gather = (
        number * (dense + expert) for number in (rank.features.gradient_bytes, NUMBER_BYTES)
    )
    # A chunk's gradients are reduced while the chunks before it go on backward, and as it ends.
    beside = 1 + (layout.vpp - 1) * layout.pp
    if config.parallel.overlap_grad_reduce:
        reduce = rank.beside(reduce, beside * min(backward.seconds for _, backward in chunks))
    if config.parallel.overlap_param_gather:
        gather = rank.beside(gather, beside * min(forward.seconds for forward, _ in chunks))
    numbers = (most.dense + most.fp32) / layout.shards + most.expert / layout.expert_shards
    # Read gradient, main parameter and two moments, write three of them and the parameter.
    update = rank.moved(numbers * (4 * 4 + 3 * 4 + 2))
    return reduce + gather, update
