"""Rules of how context-parallel ranks share layers with a state, and which way is taken."""

from typing import Literal

from megatron_hybrid.config.context_parallel import (
    CONVOLVED_BEFORE,
    exchanged_bytes,
    passed_bytes,
)
from megatron_hybrid.config.layers import layers, layers_of, mamba_layers
from megatron_hybrid.config.pattern import GDN, MAMBA, recurrent_symbols
from megatron_hybrid.config.phases import sequence_length_fields, sequence_lengths
from megatron_hybrid.config.ranks import CP, TP, rank_tokens
from megatron_hybrid.config.rules.common import (
    Facts,
    Problems,
    divisors,
    listing,
    must_be_multiple,
    on_transformer_engine,
)
from megatron_hybrid.config.run import RunConfig

Way = Literal["all_to_all", "state_passing"]


def cannot_exchange(c: RunConfig) -> Problems:
    """CP turns sequence shards into head shards: each CP rank runs whole heads and groups, an equal
    share of Mamba-1's channels, or whole key heads of a gated delta net."""
    tp, cp = c.parallel.tensor_model_parallel_size, c.parallel.context_parallel_size
    if cp == 1:
        return
    for layer in mamba_layers(c.model, 1):
        channels = layer.model.mamba_intermediate_size
        if channels is not None:
            name = layer.path("mamba_intermediate_size")
            yield from must_be_multiple(name, channels, f"{TP} * {CP}", tp * cp)
    for layer in layers_of(c.model, GDN):
        key_heads = layer.model.linear_num_key_heads
        if key_heads is not None:
            name = layer.path("linear_num_key_heads")
            yield from must_be_multiple(name, key_heads, f"{TP} * {CP}", tp * cp)
    for layer in mamba_layers(c.model, 2):
        heads, groups = layer.model.mamba_num_heads, layer.model.mamba_num_groups
        if heads is not None:
            name = layer.path("mamba_num_heads")
            yield from must_be_multiple(name, heads, f"{TP} * {CP}", tp * cp)
        if heads is None or groups % tp:
            continue
        per_rank = groups // tp
        if cp % per_rank and per_rank % cp:
            yield (
                f"{CP}={cp} must divide or be a multiple of "
                f"{layer.path('mamba_num_groups')}={groups} / {TP}={tp} = {per_rank}; "
                f"allowed: {listing(divisors(per_rank))}, {2 * per_rank}, {3 * per_rank}, ..."
            )


def cannot_pass(c: RunConfig, facts: Facts) -> Problems:
    """Each chunk goes on from the state and the last inputs of the convolution of the one before
    it, which mamba-ssm's fused kernel does not take."""
    cp = c.parallel.context_parallel_size
    if cp == 1 or not recurrent_symbols(c.model.hybrid_layer_pattern):
        return
    name = "parallel.mamba_cp_comm_type=state_passing"
    if on_transformer_engine(c, facts):
        yield (
            f"{name} is not supported on the transformer_engine backend, whose kernels for "
            "Mamba take nothing of the chunk before; allowed: all_to_all, or backend=torch"
        )
    if c.model.num_meta_tokens and c.data.packed_documents:
        yield (
            f"{name} with model.num_meta_tokens={c.model.num_meta_tokens} and "
            "data.packed_documents=true is not supported: meta tokens come before each document; "
            "allowed: all_to_all, or data.packed_documents=false"
        )
    least = 2 * cp * CONVOLVED_BEFORE
    for field, length in sequence_length_fields(c).items():
        if length + c.model.num_meta_tokens < least:
            yield (
                f"{field}={length} must be at least {CONVOLVED_BEFORE} tokens for each of the "
                f"2 * {CP}={2 * cp} chunks of {name}; allowed: {least} or more"
            )


def mamba_context_parallel(c: RunConfig, facts: Facts) -> Problems:
    """An all-to-all must be able to share the layers out, unless states can be passed instead."""
    way = c.parallel.mamba_cp_comm_type
    if way == "all_to_all" or (way == "auto" and any(cannot_pass(c, facts))):
        yield from cannot_exchange(c)


def state_passing(c: RunConfig, facts: Facts) -> Problems:
    """Where states are to be passed, they can be."""
    if c.parallel.mamba_cp_comm_type == "state_passing":
        yield from cannot_pass(c, facts)


def bytes_by_way(c: RunConfig) -> dict[Way, float]:
    """Bytes that a rank sends in the forward pass of a micro batch of the longest samples, in all
    layers with a state."""
    found: dict[Way, float] = {"all_to_all": 0.0, "state_passing": 0.0}
    tp, cp = c.parallel.tensor_model_parallel_size, c.parallel.context_parallel_size
    number_bytes = 4 if c.precision.recipe == "fp32" else 2
    longest = max(sequence_lengths(c)) + c.model.num_meta_tokens
    tokens = rank_tokens(c, longest, gathered=True)
    for layer in layers(c.model):
        kind = next((each for each in (MAMBA, GDN) if layer.has(each)), None)
        if kind is None:
            continue
        found["all_to_all"] += exchanged_bytes(
            layer.model, kind, tp=tp, cp=cp, tokens=tokens, number_bytes=number_bytes
        )
        samples = c.training.micro_batch_size
        found["state_passing"] += passed_bytes(
            layer.model, kind, tp=tp, samples=samples, number_bytes=number_bytes
        ).sent(cp)
    return found


def way_of_states(c: RunConfig, backend: str) -> Way:
    """How context-parallel ranks share layers with a state: as the config says, and with `auto` in
    the way that sends fewer bytes, of those that can be taken.

    Args:
        backend: "torch" or "transformer_engine".
    """
    way = c.parallel.mamba_cp_comm_type
    if way != "auto":
        return way
    if any(cannot_pass(c, Facts(has_cuda=backend == "transformer_engine"))):
        return "all_to_all"
    if any(cannot_exchange(c)):
        return "state_passing"
    sent = bytes_by_way(c)
    return min(sent, key=lambda each: sent[each])


def chosen_way(c: RunConfig, backend: str) -> str | None:
    """What `auto` chose, as a sentence; None: it had nothing to choose."""
    if c.parallel.mamba_cp_comm_type != "auto" or c.parallel.context_parallel_size == 1:
        return None
    if not recurrent_symbols(c.model.hybrid_layer_pattern):
        return None
    sent = bytes_by_way(c)
    return (
        f"parallel.mamba_cp_comm_type=auto is {way_of_states(c, backend)}: a rank sends "
        f"{sent['state_passing'] / 1e6:.3g} MB in a forward pass by state_passing, "
        f"{sent['all_to_all'] / 1e6:.3g} MB by all_to_all"
    )
