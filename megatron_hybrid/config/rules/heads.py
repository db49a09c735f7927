"""Rules of parallel heads: how their outputs are joined, and whose keys and values they have."""

from itertools import accumulate

from megatron_hybrid.config.describe import fields
from megatron_hybrid.config.layers import Layer, layers, layers_of, producers, shown_size
from megatron_hybrid.config.pattern import ATTENTION, MLP, MOE, PARALLEL, parse_pattern
from megatron_hybrid.config.rules.common import Facts, Problems, Rule, must_divide
from megatron_hybrid.config.run import RunConfig

# Of parallel heads whose outputs are added up, each with projections of its own.
_OF_SUMS = (
    "ssm_in_multiplier", "ssm_out_multiplier", "attention_in_multiplier",
    "attention_out_multiplier", "add_bias_linear",
)  # fmt: skip
# Layers that hand on what the engine calls the context of cross-attention.
_PASSING_ON = (MLP, MOE, ATTENTION, PARALLEL)
# What keys and values go by.
_OF_KEYS = (
    "num_attention_heads", "num_query_groups", "kv_channels", "mamba_intermediate_size",
    "position_embedding_type",
)  # fmt: skip


def parallel_heads_join(c: RunConfig, _: Facts) -> Problems:
    """The mean is of outputs of one width, of Mamba-1, before the only projection."""
    m = c.model
    join = f"model.parallel_heads_join={m.parallel_heads_join}"
    if m.parallel_heads_join != "mean" or PARALLEL not in m.hybrid_layer_pattern:
        return
    for name in _OF_SUMS:
        value, usual = getattr(m, name), fields()[f"model.{name}"].default
        if value != usual:
            yield (
                f"{join} has no use for model.{name}={shown_size(value)}; allowed: "
                f"{shown_size(usual)}, or model.parallel_heads_join=sum"
            )
    for layer in layers_of(m, PARALLEL):
        if layer.model.mamba_version != 1:
            yield (
                f"{join} is of attention and Mamba-1; {layer.path('mamba_version')}="
                f"{layer.model.mamba_version} must be 1, or model.parallel_heads_join sum"
            )
            continue
        heads, inner = layer.model.num_attention_heads, layer.model.mamba_intermediate_size
        assert inner is not None
        if heads is not None:
            yield from must_divide(
                f"{join}: {layer.path('num_attention_heads')}", heads,
                layer.path("mamba_intermediate_size"), inner,
            )  # fmt: skip


def reused_keys_and_values(c: RunConfig, _: Facts) -> Problems:
    """They are those of a layer before, of the same pipeline stage and the same sizes."""
    m = c.model
    if m.reuse_kv and not any(layer.kind == PARALLEL for layer in layers_of(m, PARALLEL)):
        yield (
            f"model.reuse_kv=true needs an 'H' layer in model.hybrid_layer_pattern="
            f"{m.hybrid_layer_pattern!r}; allowed: false"
        )
        return
    if m.reuse_kv and not m.layers:
        yield (
            "model.reuse_kv=true leaves no layer with keys and values of its own; allowed: false, "
            "or model.layers.N.reuse_kv of some"
        )
        return
    every = {layer.number: layer for layer in layers(m)} if m.layers else {}
    for number, producer in producers(m).items():
        path = every[number].path("reuse_kv")
        if m.parallel_heads_join != "mean":
            yield (
                f"{path}=true of layer {number} needs model.parallel_heads_join=mean; it is "
                f"{m.parallel_heads_join}; allowed: false"
            )
            continue
        if producer is None or producer.kind != PARALLEL:
            nearest = "is none" if producer is None else f"is layer {producer.number}, attention"
            yield (
                f"{path}=true: layer {number} needs a layer of parallel heads before it that has "
                f"keys and values; the nearest with some {nearest}; allowed: false"
            )
            continue
        yield from _of_a_producer(c, every[number], producer)


def _of_a_producer(c: RunConfig, layer: Layer, producer: Layer) -> Problems:
    """Of two layers with the same keys and values."""
    number, pattern = layer.number, parse_pattern(c.model.hybrid_layer_pattern)
    path = layer.path("reuse_kv")
    for name in _OF_KEYS:
        ours, theirs = (getattr(each.model, name) for each in (layer, producer))
        if ours != theirs:
            yield (
                f"{layer.path(name)}={shown_size(ours)} of layer {number} must be "
                f"{producer.path(name)}={shown_size(theirs)} of layer {producer.number}, whose "
                f"keys and values it reuses ({path}=true)"
            )
    chunks = pattern.chunks(c.parallel.pipeline_model_parallel_size)
    for end in accumulate(map(len, chunks)):
        if producer.number <= end < number:
            yield (
                f"{path}=true: layer {number} reuses keys and values of layer {producer.number}, "
                f"and a pipeline stage ends between them, after layer {end} of "
                f"model.hybrid_layer_pattern={c.model.hybrid_layer_pattern!r}; allowed: stages "
                "that part no such layers"
            )
    between = [
        symbol
        for symbol in pattern.layers[producer.number : number - 1]
        if symbol not in _PASSING_ON
    ]
    if between and c.training.recompute_granularity == "full":
        yield (
            f"training.recompute_granularity=full with {path}=true is not supported with an "
            f"{between[0]!r} layer between layers {producer.number} and {number}; allowed: "
            "selective, null"
        )


HEADS: tuple[Rule, ...] = (parallel_heads_join, reused_keys_and_values)
