"""How long a training step takes on a cluster: matrix products at the speed of the format, the rest
at the speed of memory, communication at that of the links, and the pipeline by simulation.

Predictions from data sheets and assumed shares of them (`hardware.py`), not held against runs.
Kernels are those of the transformer_engine backend. Assumed of communication: TP's is on the path
(no overlap with products); CP's exchange of keys and values runs beside attention; gradients are
reduced beside the backward pass of the last micro batch and parameters gathered beside the forward
pass of the first where `overlap_grad_reduce` and `overlap_param_gather` say so, else on the path.
"""

from dataclasses import dataclass, fields

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.linears import Linear, linears
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MOE
from megatron_hybrid.config.precision import FLOAT8_RECIPES, float8_layers
from megatron_hybrid.model.counts import flops_per_token, mean_keys
from megatron_hybrid.planner.hardware import (
    ATTENTION_SHARE,
    LINK_SHARE,
    MATRIX_SHARE,
    MEMORY_SHARE,
    NETWORK_SHARE,
    SCAN_SHARE,
    Gpu,
)
from megatron_hybrid.planner.layout import Layout, layout_of
from megatron_hybrid.planner.parameters import stage_parameters
from megatron_hybrid.planner.schedule import simulate

NUMBER_BYTES = 2
SCAN_CHUNK_TOKENS = 256  # of mamba-ssm's scan


@dataclass(frozen=True)
class Work:
    """Seconds of something on one rank, by cause."""

    products: float = 0.0
    attention_and_scan: float = 0.0
    memory: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> "Work":
        """The same so many times."""
        return Work(*(getattr(self, f.name) * factor for f in fields(self)))

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


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


class Rank:
    """What layers cost on a rank of a layout."""

    def __init__(self, config: RunConfig, layout: Layout, gpu: Gpu) -> None:
        self.config, self.model, self.layout, self.gpu = config, config.model, layout, gpu
        self.fp8 = config.precision.recipe in FLOAT8_RECIPES and gpu.fp8_tflops > 0

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second between ranks, of which `ranks` neighbours take part."""
        if ranks <= self.gpu.gpus_per_node:
            return self.gpu.link_gb_per_s * 1e9 * LINK_SHARE
        return self.gpu.network_gb_per_s * 1e9 * NETWORK_SHARE

    def _products(self, flops: float, *, fp8: bool) -> float:
        if fp8:
            return flops / (self.gpu.fp8_tflops * 1e12 * MATRIX_SHARE["fp8"])
        return flops / (self.gpu.bf16_tflops * 1e12 * MATRIX_SHARE["bf16"])

    def _memory(self, numbers: float) -> float:
        return NUMBER_BYTES * numbers / (self.gpu.memory_gb_per_s * 1e9 * MEMORY_SHARE)

    def layer(self, kind: str, *, fp8: bool) -> tuple[Work, Work]:
        """One micro batch through one layer, forward and backward."""
        products = self._products(self._product_flops(kind), fp8=fp8 and self.fp8)
        core, core_numbers = self._core(kind)
        memory = self._memory(core_numbers + 4 * self.layout.own_tokens * self.model.hidden_size)
        forward = Work(products, core, memory, *self._transfers(kind, core, backward=False))
        backward = Work(
            2 * products, 2.5 * core, 2 * memory, *self._transfers(kind, core, backward=True)
        )
        return forward, backward

    def _product_flops(self, kind: str) -> float:
        """Of a layer's linears on this rank, forward."""
        layout, model = self.layout, self.model
        flops = 0.0
        for linear in linears(model, kind, tp=layout.tp, etp=layout.etp).values():
            flops += 2.0 * self._tokens(linear) * linear.inputs * linear.outputs
        if kind == MOE:
            assert model.num_moe_experts is not None
            flops += 2.0 * layout.own_tokens * model.hidden_size * model.num_moe_experts
        return flops

    def _tokens(self, linear: Linear) -> int:
        """That pass through a linear on this rank; experts get them evenly."""
        routed = self.layout.own_tokens * self.model.moe_router_topk
        return routed if linear.routed else self.layout.tokens

    def _core(self, kind: str) -> tuple[float, float]:
        """What is between the linears: seconds of its products, numbers that it moves."""
        layout, model, T = self.layout, self.model, self.layout.tokens
        peak = self.gpu.bf16_tflops * 1e12
        if kind == ATTENTION:
            assert model.num_attention_heads is not None and model.kv_channels is not None
            width = model.num_attention_heads * model.kv_channels // layout.tp
            flops = 4.0 * T * width * mean_keys(model, layout.seq_length)
            return flops / (peak * ATTENTION_SHARE), 4 * T * width
        if kind == MAMBA:
            assert model.mamba_num_heads is not None
            inner = model.mamba_num_heads * model.mamba_head_dim // layout.tp
            states = model.mamba_num_groups * model.mamba_state_dim // layout.tp
            flops = 2.0 * T * inner * (SCAN_CHUNK_TOKENS / 2 + 2 * model.mamba_state_dim)
            convolved = inner + 2 * states
            return flops / (peak * SCAN_SHARE), T * (2 * convolved + 6 * inner)
        numbers = 0.0
        for name, linear in linears(model, kind, tp=layout.tp, etp=layout.etp).items():
            if "fc1" in name:  # the activation; of experts, tokens brought there and back too
                moved = 2 * linear.outputs + (4 * linear.inputs if linear.routed else 0)
                numbers += self._tokens(linear) * moved
        return 0.0, numbers

    def _transfers(self, kind: str, core: float, *, backward: bool) -> tuple[float, float, float]:
        """Seconds of TP, CP and EP, as far as nothing hides them."""
        layout, model = self.layout, self.model
        hidden = NUMBER_BYTES * layout.tokens * model.hidden_size
        # An all-gather and a reduce-scatter, or an all-reduce; gathered again for the gradient.
        moves = 3 if backward and layout.sequence_parallel else 2
        tensor = moves * hidden * (layout.tp - 1) / layout.tp / self.bandwidth(layout.tp)
        context = self._context(kind, core * (2.5 if backward else 1), backward=backward)
        expert = 0.0
        if kind == MOE and layout.ep > 1:
            sent = NUMBER_BYTES * layout.own_tokens * model.moe_router_topk * model.hidden_size
            ranks = layout.ep * max(layout.etp, layout.tp)
            expert = 2 * sent * (layout.ep - 1) / layout.ep / self.bandwidth(ranks)
        return tensor, context, expert

    def _context(self, kind: str, core: float, *, backward: bool) -> float:
        layout, model, cp = self.layout, self.model, self.layout.cp
        if cp == 1 or kind not in (ATTENTION, MAMBA):
            return 0.0
        speed = self.bandwidth(layout.tp * cp)
        if kind == ATTENTION:
            assert model.num_query_groups is not None and model.kv_channels is not None
            width = 2 * model.num_query_groups * model.kv_channels // layout.tp
            sent = (2 if backward else 1) * NUMBER_BYTES * layout.tokens * width * (cp - 1)
            return max(0.0, sent / speed - core)
        mixer = linears(model, MAMBA, tp=layout.tp)
        width = mixer["in_proj"].outputs + mixer["out_proj"].inputs
        return NUMBER_BYTES * layout.tokens * width * (cp - 1) / cp / speed

    def ends(self) -> tuple[Work, Work, Work, Work]:
        """Embedding forward and backward, output layer and loss forward and backward."""
        layout, model = self.layout, self.model
        assert model.padded_vocab_size is not None
        hidden = layout.tokens * model.hidden_size
        logits = layout.tokens * model.padded_vocab_size / layout.tp
        products = self._products(2.0 * logits * model.hidden_size, fp8=False)
        looked_up = Work(memory=self._memory(3 * hidden))
        return (
            looked_up, looked_up, Work(products, memory=self._memory(5 * logits)),
            Work(2 * products, memory=self._memory(3 * logits)),
        )  # fmt: skip


def chunk_work(config: RunConfig, layout: Layout, gpu: Gpu) -> list[tuple[Work, Work]]:
    """One micro batch through each pipeline segment, forward and backward."""
    rank, in_fp8 = Rank(config, layout, gpu), set(float8_layers(config))
    known = {
        (kind, fp8): rank.layer(kind, fp8=fp8)
        for kind in set("".join(layout.chunks))
        for fp8 in (False, True)
    }
    found, number = [], 0
    for chunk in layout.chunks:
        forward = backward = Work()
        for place, kind in enumerate(chunk):
            number += 1
            one, other = known[kind, number in in_fp8]
            forward += one
            backward += other
            backward += Work(recomputed=_again(config, kind, place, one))
        found.append((forward, backward))
    first_forward, first_backward, last_forward, last_backward = rank.ends()
    found[0] = (found[0][0] + first_forward, found[0][1] + first_backward)
    found[-1] = (found[-1][0] + last_forward, found[-1][1] + last_backward)
    return found


def _again(config: RunConfig, kind: str, place: int, forward: Work) -> float:
    """Seconds of what the backward pass computes again of a layer, the `place`-th of its chunk."""
    training = config.training
    if training.recompute_granularity == "selective":
        return forward.attention_and_scan if kind == ATTENTION else 0.0
    full = training.recompute_granularity == "full" and (
        training.recompute_method != "block" or place < (training.recompute_num_layers or 1)
    )
    return forward.seconds if full else 0.0


def transfer_seconds(config: RunConfig, layout: Layout, gpu: Gpu) -> float:
    """Of a micro batch's hidden states to the next stage."""
    hidden = NUMBER_BYTES * layout.own_tokens * config.model.hidden_size
    return hidden / Rank(config, layout, gpu).bandwidth(layout.world_size)


def step_time(config: RunConfig, world_size: int, gpu: Gpu) -> StepTime:
    """Predict a step of a valid config on `world_size` GPUs."""
    layout = layout_of(config, world_size)
    chunks = chunk_work(config, layout, gpu)
    passes = _pipeline_seconds(chunks, layout, transfer_seconds(config, layout, gpu))
    total = sum((forward + backward for forward, backward in chunks), Work())
    mean = total.times(layout.micro_batches / layout.pp)
    reduced, updated = _update(config, layout, gpu, chunks)
    seconds = passes + reduced + updated
    parts = {
        "matrix products": mean.products,
        "attention and scan": mean.attention_and_scan,
        "memory-bound": mean.memory,
        "computed again": mean.recomputed,
        "TP transfers": mean.tensor_parallel,
        "CP transfers": mean.context_parallel,
        "EP transfers": mean.expert_parallel,
        "pipeline bubble": passes - mean.seconds,
        "gradients and parameters": reduced,
        "optimizer": updated,
    }
    tokens = config.training.global_batch_size * layout.seq_length
    flops = flops_per_token(config.model, layout.seq_length).total * tokens
    mfu = flops / (seconds * world_size * gpu.bf16_tflops * 1e12)
    return StepTime(seconds, tokens, parts, mfu)


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


def _update(
    config: RunConfig, layout: Layout, gpu: Gpu, chunks: list[tuple[Work, Work]]
) -> tuple[float, float]:
    """Seconds that gradients and parameters are on their way, unhidden; and of the optimizer."""
    rank = Rank(config, layout, gpu)
    stages = [stage_parameters(config.model, layout, stage) for stage in range(layout.pp)]
    most = max(stages, key=lambda held: held.total)
    # DP ranks are TP x CP apart; experts' are further.
    speed = rank.bandwidth(layout.tp * layout.shards)
    share = (layout.shards - 1) / layout.shards
    dense = (most.dense + most.fp32) * share
    expert = most.expert * (layout.expert_shards - 1) / layout.expert_shards
    reduce, gather = ((number * (dense + expert)) / speed for number in (4, NUMBER_BYTES))
    if config.parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - min(backward.seconds for _, backward in chunks))
    if config.parallel.overlap_param_gather:
        gather = max(0.0, gather - min(forward.seconds for forward, _ in chunks))
    numbers = (most.dense + most.fp32) / layout.shards + most.expert / layout.expert_shards
    # Read gradient, main parameter and two moments, write three of them and the parameter.
    update = numbers * (4 * 4 + 3 * 4 + 2) / (gpu.memory_gb_per_s * 1e9 * MEMORY_SHARE)
    return reduce + gather, update
