"""Inputs and outputs of each linear of a layer, whole or on a tensor-parallel rank. Torch-free."""

from typing import NamedTuple

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MLP, MOE, PARALLEL, made_of


class Linear(NamedTuple):
    """Widths of a linear.

    Attributes:
        routed: each expert has one, and sees the tokens that it gets.
        whole: each TP rank has all of it, and sees its own tokens under sequence parallelism.
    """

    inputs: int
    outputs: int
    routed: bool = False
    whole: bool = False


def linears(model: ModelConfig, kind: str, *, tp: int = 1, etp: int = 1) -> dict[str, Linear]:
    """The linears of a layer, by name, as one of `tp` ranks (of an expert: of `etp`) has them.

    Sizes that do not divide are cut off: rules refuse them.
    """
    d = model.hidden_size
    if kind == PARALLEL and model.parallel_heads_join == "mean":
        return _of_shared_heads(model, tp)
    if kind == PARALLEL:
        return {
            name: linear
            for part in made_of(kind)
            for name, linear in linears(model, part, tp=tp).items()
        }
    if kind == MAMBA and model.mamba_version == 1:
        # x_proj and dt_proj are within the scan: never in float8, nor with a norm or a reduction.
        assert model.mamba_intermediate_size is not None
        own = model.mamba_intermediate_size // tp
        return {"in_proj": Linear(d, 2 * own), "out_proj": Linear(own, d)}
    if kind == MAMBA:
        assert model.mamba_num_heads is not None
        inner = model.mamba_num_heads * model.mamba_head_dim
        # Packed z, x, B, C, dt.
        width = 2 * (inner + model.mamba_num_groups * model.mamba_state_dim) + model.mamba_num_heads
        return {"in_proj": Linear(d, width // tp), "out_proj": Linear(inner // tp, d)}
    if kind == GDN:
        keys, values = gdn_widths(model)
        assert model.linear_num_value_heads is not None
        # Packed query, key, value, z, beta, alpha.
        width = 2 * (keys + values + model.linear_num_value_heads)
        return {"in_proj": Linear(d, width // tp), "out_proj": Linear(values // tp, d)}
    if kind == ATTENTION:
        heads, groups, channels = (
            model.num_attention_heads, model.num_query_groups, model.kv_channels,
        )  # fmt: skip
        assert heads is not None and groups is not None and channels is not None
        return {
            "linear_qkv": Linear(d, (heads + 2 * groups) * channels // tp),
            "linear_proj": Linear(heads * channels // tp, d),
        }
    if kind == MLP:
        assert model.ffn_hidden_size is not None
        return _mlp(model, model.ffn_hidden_size // tp, "")
    assert kind == MOE and model.moe_ffn_hidden_size is not None
    found = _mlp(model, model.moe_ffn_hidden_size // etp, " of an expert", routed=True)
    if model.moe_latent_size is not None:
        found |= {
            "fc1_latent_proj": Linear(d, model.moe_latent_size, whole=True),
            "fc2_latent_proj": Linear(model.moe_latent_size, d, whole=True),
        }
    if model.moe_shared_expert_intermediate_size is not None:
        shared = model.moe_shared_expert_intermediate_size // tp
        found |= _mlp(model, shared, " of the shared expert")
    return found


def value_channels(model: ModelConfig, kind: str) -> int:
    """Of a head of attention in a layer: where its output is joined with Mamba's channels before
    the projection, as many as make them up; else those of queries and keys.
    """
    assert model.kv_channels is not None
    if kind != PARALLEL or model.parallel_heads_join == "sum":
        return model.kv_channels
    assert model.mamba_intermediate_size is not None and model.num_attention_heads is not None
    return model.mamba_intermediate_size // model.num_attention_heads


def _of_shared_heads(model: ModelConfig, tp: int) -> dict[str, Linear]:
    heads, groups, keys = model.num_attention_heads, model.num_query_groups, model.kv_channels
    inner, d = model.mamba_intermediate_size, model.hidden_size
    assert heads is not None and groups is not None and keys is not None and inner is not None
    # Packed queries, keys, values, x, z.
    own = 0 if model.reuse_kv else groups * (keys + value_channels(model, PARALLEL))
    width = heads * keys + own + 2 * inner
    return {"in_proj": Linear(d, width // tp), "out_proj": Linear(inner // tp, d)}


def _mlp(model: ModelConfig, inner: int, whose: str, *, routed: bool = False) -> dict[str, Linear]:
    gate = 2 if model.activation == "swiglu" else 1
    width = expert_width(model) if routed else model.hidden_size
    return {
        f"linear_fc1{whose}": Linear(width, gate * inner, routed),
        f"linear_fc2{whose}": Linear(inner, width, routed),
    }


class Recurrent(NamedTuple):
    """What a layer with a state goes on from, token by token, over all TP ranks.

    Attributes:
        state: numbers in the state of its scan.
        convolved: channels of its convolution.
    """

    state: int
    convolved: int


def recurrent(model: ModelConfig, kind: str) -> Recurrent:
    """Of a gated delta net, or of a Mamba mixer where `kind` is "M"."""
    if kind == GDN:
        keys, values = gdn_widths(model)
        return Recurrent(values * model.linear_key_head_dim, 2 * keys + values)
    if model.mamba_version == 1:
        assert model.mamba_intermediate_size is not None
        inner = model.mamba_intermediate_size
        return Recurrent(inner * model.mamba_state_dim, inner)
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    shared = model.mamba_num_groups * model.mamba_state_dim  # B, and as much of C
    return Recurrent(inner * model.mamba_state_dim, inner + 2 * shared)


def gdn_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels of all keys of a gated delta net, as many as of its queries, and of all values."""
    assert model.linear_num_key_heads is not None and model.linear_num_value_heads is not None
    return (
        model.linear_num_key_heads * model.linear_key_head_dim,
        model.linear_num_value_heads * model.linear_value_head_dim,
    )


def expert_width(model: ModelConfig) -> int:
    """What a token has when it goes to an expert."""
    return model.moe_latent_size or model.hidden_size
