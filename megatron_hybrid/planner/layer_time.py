"""Seconds that one micro batch spends in each kind of layer on a rank, by what it spends them on.

Kernels are those of the transformer_engine backend. A layer's kernels run one after the other:
products at a share of the format's peak, beside which their operands and results are moved; casts,
norms, activations, permutations and the rest at a share of the memory's bandwidth. Each kernel has
a start of its own, and the host, which launches one after the other, may be slower than all.
"""

import copy
from dataclasses import dataclass, fields, replace

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.config.context_parallel import exchanged_bytes, passed_bytes
from megatron_hybrid.config.linears import (
    Linear,
    expert_width,
    gdn_widths,
    linears,
    value_channels,
)
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MLP, MOE, PARALLEL, made_of
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.model.counts import layer_parameters, mean_keys
from megatron_hybrid.planner.hardware import SHARES, Gpu, Shares
from megatron_hybrid.planner.layout import Layout

NUMBER_BYTES = 2
SCAN_CHUNK_TOKENS = 256  # of mamba-ssm's scan
DELTA_CHUNK_TOKENS = 64  # of ops.gated_delta
# Kernels that the host launches for a layer's forward pass, counted in Transformer Engine's and
# megatron-core's sources; the backward pass has about as many. Of MoE also some a local expert.
LAUNCHES = {ATTENTION: 30, MAMBA: 30, MLP: 20, MOE: 110, PARALLEL: 65, GDN: 150}
LAUNCHES_OF_AN_EXPERT = {"bf16": 2, "fp8": 5}
# What CUDA graphs' modules (the engine's names) hold of them.
IN_GRAPHS = {
    "attn": (ATTENTION, 1.0), "mamba": (MAMBA, 1.0), "mlp": (MLP, 1.0), "moe": (MOE, 1.0),
    "moe_router": (MOE, 0.25), "moe_preprocess": (MOE, 0.15),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Seconds of something on one rank, by cause."""

    products: float = 0.0
    attention_and_scan: float = 0.0
    memory: float = 0.0
    launches: float = 0.0
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
class Features:
    """What a run has of overlap and graphs beyond what its config says.

    Attributes:
        graphs: parts of layers that CUDA graphs hold, by the engine's names; "all": the whole step.
        tp_overlap: TP's transfers run beside the products.
        ep_overlap: transfers to experts run beside another micro batch's products.
        gradient_bytes: of a number of the gradients that are kept and reduced.
        recompute: modules that are computed again, by the engine's names.
    """

    graphs: tuple[str, ...] = ()
    tp_overlap: bool = False
    ep_overlap: bool = False
    gradient_bytes: int = 4
    recompute: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> "Features":
        """Of a run of ours, which has neither overlap: megatron-core alone does not set it up."""
        gpu, training = config.gpu, config.training
        graphs: tuple[str, ...] = ()
        if gpu.cuda_graph_impl != "none":
            graphs = gpu.cuda_graph_modules or ("attn", "mamba", "mlp")
        recompute: tuple[str, ...] = ()
        if training.recompute_granularity == "selective":
            recompute = training.recompute_modules or ("core_attn",)
        return cls(graphs=graphs, recompute=recompute)


class Rank:
    """What layers cost on a rank of a layout."""

    def __init__(
        self,
        config: RunConfig,
        layout: Layout,
        gpu: Gpu,
        features: Features | None = None,
        shares: Shares = SHARES,
    ) -> None:
        self.config, self.model, self.layout, self.gpu = config, config.model, layout, gpu
        self.features = features or Features.of(config)
        self.shares = shares
        self.recipe = config.precision.recipe
        self.fp8 = self.recipe in FLOAT8_RECIPES and gpu.fp8_tflops > 0

    def of_sizes(self, model: ModelConfig) -> "Rank":
        """The same rank of layers that have the sizes of `model`."""
        if model is self.model:
            return self
        other = copy.copy(self)
        other.model = model
        return other

    def bandwidth(self, ranks: int) -> float:
        """Bytes a second between ranks, of which `ranks` neighbours take part."""
        if ranks <= self.gpu.gpus_per_node:
            return self.gpu.link_gb_per_s * 1e9 * self.shares.link
        return self.gpu.network_gb_per_s * 1e9 * self.shares.network

    def replica_bandwidth(self, ranks: int, apart: int) -> float:
        """Bytes a second of a ring over ranks that are `apart`: those of a node share its ports."""
        link = self.gpu.link_gb_per_s * 1e9 * self.shares.link
        if ranks * apart <= self.gpu.gpus_per_node:
            return link
        together = max(1, self.gpu.gpus_per_node // apart)
        return min(link, together * self.gpu.network_gb_per_s * 1e9 * self.shares.network)

    def beside(self, transfer: float, seconds: float) -> float:
        """What is seen of a transfer that runs beside `seconds` of work: it takes from that too."""
        return max(transfer - seconds, (1 - self.shares.hidden) * transfer)

    def moved(self, number_bytes: float) -> float:
        """Seconds to move so many bytes in the GPU's own memory."""
        return number_bytes / (self.gpu.memory_gb_per_s * 1e9 * self.shares.memory)

    def product(self, rows: float, linear: Linear, *, fp8: bool, times: int = 1) -> float:
        """Seconds of `times` products of `rows` tokens with a linear's weight."""
        peak = self.gpu.fp8_tflops if fp8 else self.gpu.bf16_tflops
        share = self.shares.products[self.gpu.generation, "fp8" if fp8 else "bf16"]
        flops = 2.0 * rows * linear.inputs * linear.outputs
        operand = 1 if fp8 else NUMBER_BYTES
        size = (
            operand * (rows + linear.outputs) * linear.inputs + NUMBER_BYTES * rows * linear.outputs
        )
        one = flops / (peak * 1e12 * share) + self.moved(size) + 1e-6 * self.shares.kernel_us
        return times * one

    def cast(self, numbers: float, *, fp8: bool) -> float:
        """Seconds to bring numbers into float8, for use as rows and as columns."""
        if not fp8:
            return 0.0
        again = NUMBER_BYTES if self.recipe == "fp8_tensorwise" else 0  # for the largest value
        return self.moved(numbers * (NUMBER_BYTES + 2 + again))

    def layer(self, kind: str, *, fp8: bool) -> tuple[Work, Work]:
        """One micro batch through one layer, forward and backward."""
        fp8 = fp8 and self.fp8
        products, casts = self._linears(kind, fp8=fp8)
        core, (forward_bytes, backward_bytes) = self._core(kind)
        layout = self.layout
        hidden = layout.own_tokens * self.model.hidden_size
        # The norm reads and writes, the residual is read twice and written once.
        forward_bytes += 5 * NUMBER_BYTES * hidden
        backward_bytes += 6 * NUMBER_BYTES * hidden
        forward = Work(
            products, core, casts + self.moved(forward_bytes), 0.0,
            *self._transfers(kind, core, backward=False),
        )  # fmt: skip
        # Gradients of linears' outputs are cast like their inputs; weights were cast before. Those
        # of weights are added to what is there.
        held = layer_parameters(self.model, kind, tp=layout.tp, ep=layout.ep, etp=layout.etp)
        backward_bytes += 2 * self.features.gradient_bytes * held.total
        backward = Work(
            2 * products, 2.5 * core, casts + self.moved(backward_bytes), 0.0,
            *self._transfers(kind, core, backward=True),
        )  # fmt: skip
        forward, backward = (self._launched(kind, work, fp8=fp8) for work in (forward, backward))
        if kind == MOE and not {"all", "moe"} & set(self.features.graphs):
            forward += Work(launches=1e-6 * self.shares.sync_us)
        return forward, backward

    def _launched(self, kind: str, work: Work, *, fp8: bool) -> Work:
        """With the time that the GPU waits for the host, if it does."""
        graphs = self.features.graphs
        if "all" in graphs:
            return work
        count: float = LAUNCHES[kind]
        count *= 1 - sum(part for name in graphs for of, part in [IN_GRAPHS[name]] if of == kind)
        if kind == MOE and "moe" not in graphs:
            assert self.model.num_moe_experts is not None
            local = self.model.num_moe_experts // self.layout.ep
            count += LAUNCHES_OF_AN_EXPERT["fp8" if fp8 else "bf16"] * local
        waits = 1e-6 * self.shares.launch_us * count - work.seconds
        return replace(work, launches=max(0.0, waits))

    def _linears(self, kind: str, *, fp8: bool) -> tuple[float, float]:
        """Of a layer's linears, forward: seconds of products, and of casts."""
        layout, model = self.layout, self.model
        products = casts = 0.0
        for linear in linears(model, kind, tp=layout.tp, etp=layout.etp).values():
            if linear.routed:
                assert model.num_moe_experts is not None
                local = model.num_moe_experts // layout.ep
                tokens = layout.own_tokens * model.moe_router_topk
                products += self.product(tokens / local, linear, fp8=fp8, times=local)
            else:
                tokens = layout.own_tokens if linear.whole else layout.tokens
                products += self.product(tokens, linear, fp8=fp8)
            casts += self.cast(tokens * linear.inputs, fp8=fp8)
        if kind == MOE:
            assert model.num_moe_experts is not None
            router = Linear(model.hidden_size, model.num_moe_experts)
            products += self.product(layout.own_tokens, router, fp8=False)
        return products, casts

    def shared_experts(self, *, fp8: bool) -> float:
        """Seconds of their forward pass in one MoE layer."""
        layout, model, seconds = self.layout, self.model, 0.0
        gates = 2 if model.activation == "swiglu" else 1
        for name, linear in linears(model, MOE, tp=layout.tp, etp=layout.etp).items():
            if not linear.routed and not linear.whole:
                seconds += self.product(layout.tokens, linear, fp8=fp8 and self.fp8)
                seconds += self.cast(layout.tokens * linear.inputs, fp8=fp8 and self.fp8)
                if "fc1" in name:
                    inner = layout.tokens * linear.outputs / gates
                    seconds += self.moved(NUMBER_BYTES * inner * (gates + 1))
        return seconds

    def _core(self, kind: str) -> tuple[float, tuple[float, float]]:
        """What is between the linears: seconds of its products; bytes moved in either pass."""
        layout, model, T = self.layout, self.model, self.layout.tokens
        peak = self.gpu.bf16_tflops * 1e12
        if kind == PARALLEL:
            cores = [self._attention(kind), self._core(MAMBA)]
            hidden = NUMBER_BYTES * layout.own_tokens * model.hidden_size
            # The join reads both outputs and writes one; gradients of both inputs are added up.
            joined = (3 * hidden, 5 * hidden)
            if model.parallel_heads_join == "mean":  # of all channels, after their norms
                assert model.mamba_intermediate_size is not None
                inner = layout.tokens * model.mamba_intermediate_size // layout.tp
                joined = (7 * NUMBER_BYTES * inner, 12 * NUMBER_BYTES * inner)
            moved_each = zip(joined, *(moved for _, moved in cores), strict=True)
            forward, backward = map(sum, moved_each)
            return sum(seconds for seconds, _ in cores), (forward, backward)
        if kind == ATTENTION:
            return self._attention(kind)
        if kind == MAMBA and model.mamba_version == 1:
            return self._selective_scan()
        if kind == MAMBA:
            assert model.mamba_num_heads is not None
            inner = model.mamba_num_heads * model.mamba_head_dim // layout.tp
            states = model.mamba_num_groups * model.mamba_state_dim // layout.tp
            flops = 2.0 * T * inner * (SCAN_CHUNK_TOKENS / 2 + 2 * model.mamba_state_dim)
            convolved = inner + 2 * states
            moved = NUMBER_BYTES * T * (2 * convolved + 6 * inner)
            return flops / (peak * self.shares.scan[self.gpu.generation]), (moved, 2 * moved)
        if kind == GDN:
            return self._gated_delta_rule()
        return 0.0, self._activated(kind)

    def _attention(self, kind: str) -> tuple[float, tuple[float, float]]:
        """The products with keys and values in a layer of a kind, and what they move."""
        layout, model, T = self.layout, self.model, self.layout.tokens
        heads, groups, channels = (
            model.num_attention_heads, model.num_query_groups, model.kv_channels,
        )  # fmt: skip
        assert heads is not None and groups is not None and channels is not None
        of_values = value_channels(model, kind)
        width, keys = heads * channels // layout.tp, groups * channels // layout.tp
        outputs, values = heads * of_values // layout.tp, groups * of_values // layout.tp
        flops = 2.0 * T * (width + outputs) * mean_keys(model, layout.seq_length)
        rotated = 2 * (width + keys) if model.position_embedding_type == "rope" else 0
        moved = NUMBER_BYTES * T * (width + outputs + keys + values + rotated)
        share = self.shares.attention[self.gpu.generation]
        return flops / (self.gpu.bf16_tflops * 1e12 * share), (moved, 2 * moved)

    def _gated_delta_rule(self) -> tuple[float, tuple[float, float]]:
        """The rule in chunks by torch's kernels: each product's operands and result are moved."""
        layout, model, T = self.layout, self.model, self.layout.tokens
        keys, values = (width // layout.tp for width in gdn_widths(model))
        n, heads = model.linear_key_head_dim, (model.linear_num_value_heads or 0) // layout.tp
        # Within a chunk: keys by keys, queries by keys, their inverse by both, by changes; and the
        # state by w, by queries, and what it becomes.
        flops = (
            2.0 * T * (DELTA_CHUNK_TOKENS * (2 * keys + 2 * values + heads * n) + 3 * values * n)
        )
        moved = T * (4 * 5 * heads * DELTA_CHUNK_TOKENS + 4 * 8 * (values + heads * n))
        moved += NUMBER_BYTES * T * (4 * keys + 4 * values)
        # In fp32, which no tensor core multiplies: half of what bf16's have at a sixteenth.
        return flops / (self.gpu.bf16_tflops * 1e12 / 32), (moved, 3 * moved)

    def _selective_scan(self) -> tuple[float, tuple[float, float]]:
        """Mamba-1's products and its scan, whose states stay on the chip; a copy of each input.

        The scan itself is taken to be hidden behind what it moves, which was not measured.
        """
        layout, model, T = self.layout, self.model, self.layout.tokens
        assert model.mamba_intermediate_size is not None and model.mamba_dt_rank is not None
        inner, n = model.mamba_intermediate_size // layout.tp, model.mamba_state_dim
        flops = 4.0 * T * inner * (model.mamba_dt_rank + n)
        moved = NUMBER_BYTES * T * 14 * inner
        return flops / (self.gpu.bf16_tflops * 1e12), (moved, 2 * moved)

    def _activated(self, kind: str) -> tuple[float, float]:
        """Bytes of the activation; of experts also of the router and of bringing tokens there."""
        layout, model = self.layout, self.model
        gates = 2 if model.activation == "swiglu" else 1
        forward = backward = 0.0
        for name, linear in linears(model, kind, tp=layout.tp, etp=layout.etp).items():
            if not name.startswith("linear_fc1"):
                continue
            tokens = layout.own_tokens * model.moe_router_topk if linear.routed else layout.tokens
            inner = tokens * linear.outputs / gates
            forward += NUMBER_BYTES * inner * (gates + 1)
            backward += NUMBER_BYTES * inner * (2 * gates + 1)
        if kind == MOE:
            assert model.num_moe_experts is not None
            sent = layout.own_tokens * model.moe_router_topk * expert_width(model)
            # Copied for sending, sorted by expert, sorted back, weighted and summed.
            copies = 6 if layout.ep > 1 else 4
            scores = 4 * 10 * layout.own_tokens * model.num_moe_experts
            forward += NUMBER_BYTES * copies * sent + scores
            backward += NUMBER_BYTES * copies * sent + scores
        return forward, backward

    def _transfers(self, kind: str, core: float, *, backward: bool) -> tuple[float, float, float]:
        """Seconds of TP, CP and EP, as far as nothing hides them."""
        layout, model = self.layout, self.model
        hidden = NUMBER_BYTES * layout.tokens * model.hidden_size
        # An all-gather and a reduce-scatter, or an all-reduce; gathered again for the gradient.
        moves = 3 if backward and layout.sequence_parallel else 2
        if kind != PARALLEL or model.parallel_heads_join == "sum":
            moves *= len(made_of(kind))  # each has linears of its own
        tensor = moves * hidden * (layout.tp - 1) / layout.tp / self.bandwidth(layout.tp)
        if self.features.tp_overlap:
            tensor *= 1 - self.shares.hidden
        context = self._context(kind, core * (2.5 if backward else 1), backward=backward)
        expert = 0.0
        if kind == MOE and layout.ep > 1:
            expert = 2 * self._dispatched()
            if self.features.ep_overlap:
                expert *= 1 - self.shares.hidden
        return tensor, context, expert

    def _dispatched(self) -> float:
        """Seconds to send tokens to their experts: over the links, and what leaves the node.

        A token goes to each other node once, however many of its experts are there.
        """
        layout, model = self.layout, self.model
        ranks = layout.ep * max(layout.etp, layout.tp)
        token = NUMBER_BYTES * expert_width(model)
        copies = model.moe_router_topk * (layout.ep - 1) / layout.ep
        inside = layout.own_tokens * copies * token
        link = self.gpu.link_gb_per_s * 1e9 * self.shares.link
        if ranks <= self.gpu.gpus_per_node:
            return inside / link
        nodes = ranks / self.gpu.gpus_per_node
        reached = nodes * (1 - (1 - 1 / nodes) ** model.moe_router_topk)  # of random choices
        outside = layout.own_tokens * reached * (nodes - 1) / nodes * token
        return max(inside / nodes / link, outside / self.bandwidth(ranks))

    def _context(self, kind: str, core: float, *, backward: bool) -> float:
        layout, model, cp = self.layout, self.model, self.layout.cp
        if kind == PARALLEL:
            # One after the other; what hides the keys and values is the core of attention alone.
            share = self._attention(kind)[0] / max(self._core(kind)[0], 1e-12)
            return self._keys_and_values(kind, core * share, backward=backward) + self._context(
                MAMBA, 0.0, backward=backward
            )
        if kind == ATTENTION:
            return self._keys_and_values(kind, core, backward=backward)
        if cp == 1 or kind not in (MAMBA, GDN):
            return 0.0
        speed = self.bandwidth(layout.tp * cp)
        if layout.passes_states:
            passed = passed_bytes(
                model, kind, tp=layout.tp, samples=layout.micro_batch, number_bytes=NUMBER_BYTES
            )
            # From chunk to chunk, up the ranks and down again, while the others wait.
            return (2 * (cp - 1) * passed.state + 2 * passed.end) / speed
        sent = exchanged_bytes(
            model, kind, tp=layout.tp, cp=cp, tokens=layout.tokens, number_bytes=NUMBER_BYTES
        )
        return sent / speed

    def _keys_and_values(self, kind: str, core: float, *, backward: bool) -> float:
        """Seconds of CP's ring, as far as the core of attention does not hide it."""
        layout, model, cp = self.layout, self.model, self.layout.cp
        if cp == 1:
            return 0.0
        speed = self.bandwidth(layout.tp * cp)
        assert model.num_query_groups is not None and model.kv_channels is not None
        channels = model.kv_channels + value_channels(model, kind)
        width = model.num_query_groups * channels // layout.tp
        sent = (2 if backward else 1) * NUMBER_BYTES * layout.tokens * width * (cp - 1)
        return max(0.0, sent / speed - core)

    def ends(self) -> tuple[Work, Work, Work, Work]:
        """Embedding forward and backward, output layer and loss forward and backward."""
        layout, model = self.layout, self.model
        assert model.padded_vocab_size is not None
        hidden = layout.tokens * model.hidden_size
        width = model.padded_vocab_size // layout.tp
        products = self.product(layout.tokens, Linear(model.hidden_size, width), fp8=False)
        looked_up = Work(memory=self.moved(3 * NUMBER_BYTES * hidden))
        logits = NUMBER_BYTES * layout.tokens * width
        return (
            looked_up, looked_up, Work(products, memory=self.moved(5 * logits)),
            Work(2 * products, memory=self.moved(3 * logits)),
        )  # fmt: skip
