"""Which channels of an MLP each expert takes, and by how much its weights are scaled.

An MLP's f inner channels are cut into G shards of f / G. The first S of them make up the shared
expert, if there is one. Of the other R = G - S, each is copied E times, and every copy of a shard
is an expert: expert i has the copy i // R of the routed shard i % R. Experts of one copy share a
row of the router, so that the T experts of a token hold every shard once where T = R.

Source: "Upcycling Large Language Models into Mixture of Experts", 2410.07524, sections 3.1 to 3.3,
where S = 0. With shared experts the same reasoning holds for the routed shards alone.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.saved_config import (
    OF_LAYERS,
    SHAPE_FIELDS,
    layer_sizes,
    other_sizes,
)
from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.layers import layers as layers_of_model
from megatron_hybrid.config.layers import shown_size
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import MLP, MOE, parse_pattern
from megatron_hybrid.config.rules.common import divisors, listing

# Of a layer's output as a function of one factor on both of its matrices (on all three, gated).
_HOMOGENEOUS_DEGREE = {"squared_relu": 3, "swiglu": 3, "gelu": 2}
# How tokens are routed, in all MoE layers of a model alike.
_ROUTING_FIELDS = (
    "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
)  # fmt: skip
_EXPERT_FIELDS = (
    "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_router_enable_expert_bias", "moe_latent_size",
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How MLPs become experts.

    Attributes:
        layers: numbers of the layers that change, from 0.
        expansion: E, copies of each routed shard.
        granularity: G, shards of an MLP.
        shared_shards: S.
        topk: T.
        width: channels of a shard, f / G.
        gated: the first matrix holds gate and up, each of f rows.
        scale: factor on the routed experts' matrices.
    """

    layers: tuple[int, ...]
    expansion: int
    granularity: int
    shared_shards: int
    topk: int
    width: int
    gated: bool
    scale: float

    @property
    def routed_shards(self) -> int:
        """R."""
        return self.granularity - self.shared_shards

    @property
    def num_experts(self) -> int:
        """E * R."""
        return self.expansion * self.routed_shards

    @property
    def channels(self) -> int:
        """f, of the MLP."""
        return self.granularity * self.width

    def channels_of(self, expert: int) -> slice:
        """The MLP's channels that an expert has."""
        start = (self.shared_shards + expert % self.routed_shards) * self.width
        return slice(start, start + self.width)

    @property
    def shared_channels(self) -> slice:
        """The MLP's channels that the shared expert has."""
        return slice(0, self.shared_shards * self.width)


def weight_scale(moe: ModelConfig, expansion: int, routed_shards: int) -> float:
    """The factor on both matrices of each expert with which a layer's output stays as large.

    Where the router's logits are alike, a shard's copies that a token visits weigh together
    (sum of the top-k probabilities) / R; the factor makes up for that. With softmax before the
    top-k the sum is T / (E * R), after it 1; a sigmoid's probabilities are divided by their sum,
    but for a single one, which is about 1/2.
    """
    experts, topk = expansion * routed_shards, moe.moe_router_topk
    if moe.moe_router_score_function == "sigmoid":
        total = 1.0 if topk > 1 else 0.5
    else:
        total = topk / experts if moe.moe_router_pre_softmax else 1.0
    total *= moe.moe_router_topk_scaling_factor or 1.0
    factor: float = (routed_shards / total) ** (1 / _HOMOGENEOUS_DEGREE[moe.activation])
    return factor


def scheme_between(dense: ModelConfig, moe: ModelConfig, *, scale_weights: bool) -> Scheme:
    """How a dense model's MLPs become the experts of another model.

    Args:
        dense: may have MoE layers of its own, which stay as they are.
        moe: the same but for its pattern, and what belongs to experts.
        scale_weights: as `upcycling.scale_weights`.

    Raises:
        CheckpointError: the one cannot become the other, with every reason.
    """
    layers, problems = _changed_layers(dense, moe)
    unlike = bool(dense.layers or moe.layers)
    problems += [
        f"model.{name}={shown(ours)}, in the dense checkpoint {shown(theirs)}"
        for name in _fields_in_common(dense)
        if not (unlike and name in OF_LAYERS)
        # Of the same words, they are the same model however they are padded.
        if not (name == "padded_vocab_size" and moe.vocab_size == dense.vocab_size)
        and (ours := getattr(moe, name)) != (theirs := getattr(dense, name))
    ]
    if unlike and not problems:
        found = other_sizes(moe, layer_sizes(dense), (*SHAPE_FIELDS, *_ROUTING_FIELDS))
        # Of those that change, the one has no sizes of the other.
        problems += [
            f"{name}={shown(ours)}, in the dense checkpoint {shown(theirs)}"
            for name, ours, theirs in found
        ]
    dense, other_mlps = sizes_in_common(dense, [number + 1 for number in layers])
    moe, other_experts = sizes_in_common(moe, [number + 1 for number in layers])
    problems += other_mlps + other_experts + factors_problem(dense)
    if moe.add_bias_linear:
        problems.append("model.add_bias_linear=true must be false: biases are not cut into experts")
    if moe.moe_latent_size is not None:
        problems.append(
            f"model.moe_latent_size={moe.moe_latent_size} must be null: an MLP reads tokens as "
            "they are, and so must the experts that are cut from it"
        )
    granularity, shared, cut_problems = _cut(dense, moe)
    problems += cut_problems
    experts, routed = moe.num_moe_experts or 0, granularity - shared
    if not cut_problems and experts % routed:
        problems.append(
            f"model.num_moe_experts={experts} must be a multiple of the {routed} routed shards of "
            f"an MLP (model.ffn_hidden_size={dense.ffn_hidden_size} / "
            f"model.moe_ffn_hidden_size={moe.moe_ffn_hidden_size}, less those of the shared "
            f"expert); allowed: {routed}, {2 * routed}, {3 * routed}, ..."
        )
    if problems:
        lines = [f"  - {problem}" for problem in problems]
        raise CheckpointError(
            "\n".join(["the dense model cannot be upcycled into this one:", *lines])
        )
    expansion = experts // routed
    return Scheme(
        layers=layers,
        expansion=expansion,
        granularity=granularity,
        shared_shards=shared,
        topk=moe.moe_router_topk,
        width=moe.moe_ffn_hidden_size or 0,
        gated=moe.activation == "swiglu",
        scale=weight_scale(moe, expansion, routed) if scale_weights else 1.0,
    )


def factors_problem(dense: ModelConfig) -> list[str]:
    """Why the MLPs of a dense model compute what no experts do; empty: they do not."""
    factors, none = dense.mlp_multipliers, ModelConfig.model_fields["mlp_multipliers"].default
    if factors == none:
        return []
    return [
        f"the dense model has model.mlp_multipliers={shown_size(factors)}, and experts have no "
        f"factors; allowed: {shown_size(none)}"
    ]


def sizes_in_common(model: ModelConfig, numbers: Collection[int]) -> tuple[ModelConfig, list[str]]:
    """The model with the sizes of some of its layers (from 1), and where these are unlike."""
    chosen = [layer for layer in layers_of_model(model) if layer.number in numbers]
    if not chosen:
        return model, []
    first, *others = chosen
    return first.model, [
        f"{layer.path(name)}={shown(value)} must be {first.path(name)}="
        f"{shown(first.sizes[name])}: MLPs are upcycled alike, layer {layer.number} as layer "
        f"{first.number}"
        for layer in others
        for name, value in layer.sizes.items()
        if value != first.sizes[name]
    ]


def _changed_layers(dense: ModelConfig, moe: ModelConfig) -> tuple[tuple[int, ...], list[str]]:
    """Numbers of the layers that are an MLP in the one and MoE in the other; what else differs."""
    before, after = (parse_pattern(model.hybrid_layer_pattern).layers for model in (dense, moe))
    changed = tuple(
        number for number, pair in enumerate(zip(before, after, strict=False)) if pair == (MLP, MOE)
    )
    expected = "".join(MOE if n in changed else symbol for n, symbol in enumerate(before))
    if expected != after:
        return changed, [
            f"model.hybrid_layer_pattern={after!r} must be the dense checkpoint's {before!r} with "
            f"'{MOE}' in place of some '{MLP}'"
        ]
    if not changed:
        return changed, [
            f"model.hybrid_layer_pattern={after!r} has no '{MOE}' where the dense checkpoint's "
            f"{before!r} has '{MLP}'"
        ]
    return changed, []


def _fields_in_common(dense: ModelConfig) -> tuple[str, ...]:
    """What both models must agree on; also about experts, where the dense one has some."""
    left_out = ["hybrid_layer_pattern"]
    if MOE not in dense.hybrid_layer_pattern:
        left_out += [*_EXPERT_FIELDS, *_ROUTING_FIELDS]
    return tuple(n for n in (*SHAPE_FIELDS, *_ROUTING_FIELDS) if n not in left_out)


def _cut(dense: ModelConfig, moe: ModelConfig) -> tuple[int, int, list[str]]:
    """G, S, and what stands against them."""
    f, width = dense.ffn_hidden_size or 0, moe.moe_ffn_hidden_size or 1
    shared_width = moe.moe_shared_expert_intermediate_size or 0
    granularity, rest = divmod(f, width)
    if rest or not granularity:
        allowed = listing(sorted(divisors(f), reverse=True))
        return (
            1,
            0,
            [
                f"model.moe_ffn_hidden_size={width} must divide the MLPs' "
                f"model.ffn_hidden_size={f}; allowed: {allowed}"
            ],
        )
    shared, rest = divmod(shared_width, width)
    if rest or shared >= granularity:
        allowed = listing([number * width for number in range(1, granularity)]) or "null"
        return (
            1,
            0,
            [
                f"model.moe_shared_expert_intermediate_size={shared_width} must be some of the "
                f"{granularity} shards of {width} channels, but not all; allowed: null, {allowed}"
            ],
        )
    return granularity, shared, []
