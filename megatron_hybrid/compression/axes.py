"""Which channels, heads or experts each dimension of each tensor runs over.

Legend: h hidden size, f channels of an MLP, H heads of Mamba-2, P channels of a head, G groups, N
states of a channel, n query heads, g heads of keys and values, d channels of a head, E experts.

An axis is a name: HIDDEN, or one of a layer. What stays of it is said by its indices, ascending.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE

HIDDEN = "hidden"
FFN, SHARED, EXPERTS = "ffn", "shared", "experts"
MAMBA_HEADS, MAMBA_CHANNELS = "mamba_heads", "mamba_channels"
QUERY_HEADS = "query_heads"
# Of what is stored, made of those: see `stored_axes`.
_FC1, _SHARED_FC1, _INNER, _QUERY, _QKV = "fc1", "shared_fc1", "inner", "query", "qkv"

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Dims:
    """What a tensor's dimensions run over.

    Attributes:
        axes: of each dimension; None: of nothing that is cut.
        normed: it is the weight of a norm over its axis: the mean square that it follows is one
            over fewer channels, which a factor on it makes up for.
    """

    axes: Axes
    normed: bool = False


_WHOLE = {
    "embedding.word_embeddings.weight": Dims((None, HIDDEN)),
    "embedding.meta_tokens": Dims((None, HIDDEN)),
    "output_layer.weight": Dims((None, HIDDEN)),
    "decoder.final_norm.weight": Dims((HIDDEN,), normed=True),
}
_NORM = Dims((HIDDEN,), normed=True)
_OF_KIND = {
    MAMBA: {
        "mixer.in_proj.layer_norm_weight": _NORM,
        "norm.weight": _NORM,
        "mixer.in_proj.weight.z": Dims((_INNER, HIDDEN)),
        "mixer.in_proj.weight.x": Dims((_INNER, HIDDEN)),
        "mixer.in_proj.weight.B": Dims((None, HIDDEN)),
        "mixer.in_proj.weight.C": Dims((None, HIDDEN)),
        "mixer.in_proj.weight.dt": Dims((MAMBA_HEADS, HIDDEN)),
        "mixer.conv1d.weight.x": Dims((_INNER, None, None)),
        "mixer.conv1d.weight.B": Dims((None, None, None)),
        "mixer.conv1d.weight.C": Dims((None, None, None)),
        "mixer.conv1d.bias.x": Dims((_INNER,)),
        "mixer.conv1d.bias.B": Dims((None,)),
        "mixer.conv1d.bias.C": Dims((None,)),
        "mixer.A_log": Dims((MAMBA_HEADS,)),
        "mixer.D": Dims((MAMBA_HEADS,)),
        "mixer.dt_bias": Dims((MAMBA_HEADS,)),
        "mixer.norm.weight": Dims((_INNER,), normed=True),
        "mixer.out_proj.weight": Dims((HIDDEN, _INNER)),
    },
    ATTENTION: {
        "self_attention.linear_qkv.layer_norm_weight": _NORM,
        "input_layernorm.weight": _NORM,
        "self_attention.linear_qkv.weight": Dims((_QKV, HIDDEN)),
        "self_attention.linear_qkv.bias": Dims((_QKV,)),
        "self_attention.linear_proj.weight": Dims((HIDDEN, _QUERY)),
        "self_attention.linear_proj.bias": Dims((HIDDEN,)),
    },
    MLP: {
        "mlp.linear_fc1.layer_norm_weight": _NORM,
        "pre_mlp_layernorm.weight": _NORM,
        "mlp.linear_fc1.weight": Dims((_FC1, HIDDEN)),
        "mlp.linear_fc1.bias": Dims((_FC1,)),
        "mlp.linear_fc2.weight": Dims((HIDDEN, FFN)),
        "mlp.linear_fc2.bias": Dims((HIDDEN,)),
    },
    MOE: {
        "pre_mlp_layernorm.weight": _NORM,
        "mlp.router.weight": Dims((EXPERTS, HIDDEN)),
        "mlp.router.expert_bias": Dims((EXPERTS,)),
        "mlp.fc1_latent_proj.weight": Dims((None, HIDDEN)),
        "mlp.fc2_latent_proj.weight": Dims((HIDDEN, None)),
        "mlp.shared_experts.linear_fc1.weight": Dims((_SHARED_FC1, HIDDEN)),
        "mlp.shared_experts.linear_fc2.weight": Dims((HIDDEN, SHARED)),
    },
}


def dims_of(name: str, kind: str, model: ModelConfig) -> Dims | None:
    """Of a tensor of a layer by its name below the layer's, or of one that is of no layer.

    Args:
        kind: of the layer; "": of none.
        model: with the layer's own sizes.

    Returns:
        None: nothing is known of it, so that it cannot be cut.
    """
    if not kind:
        return _WHOLE.get(name)
    if kind == MOE and name.startswith("mlp.experts."):
        width = HIDDEN if model.moe_latent_size is None else None
        if name.endswith("linear_fc1.weight"):
            return Dims((EXPERTS, None, width))
        return Dims((EXPERTS, width, None)) if name.endswith("linear_fc2.weight") else None
    return _OF_KIND.get(kind, {}).get(name)


def stored_axes(model: ModelConfig, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The indices that stay of every axis of one layer's tensors: int64, ascending.

    Args:
        model: the parent's, with the layer's own sizes.
        kept: of FFN, SHARED, EXPERTS, MAMBA_HEADS, MAMBA_CHANNELS (of P) and QUERY_HEADS, those
            that the layer has.
    """
    found = dict(kept)
    gated = model.activation == "swiglu"
    if FFN in kept:
        assert model.ffn_hidden_size is not None
        found[_FC1] = _halves(kept[FFN], model.ffn_hidden_size, gated=gated)
    if SHARED in kept:
        assert model.moe_shared_expert_intermediate_size is not None
        size = model.moe_shared_expert_intermediate_size
        found[_SHARED_FC1] = _halves(kept[SHARED], size, gated=gated)
    if MAMBA_HEADS in kept:
        p = model.mamba_head_dim
        found[_INNER] = (kept[MAMBA_HEADS][:, None] * p + kept[MAMBA_CHANNELS]).flatten()
    if QUERY_HEADS in kept:
        found |= _attention(model, kept[QUERY_HEADS])
    return found


def _halves(kept: Tensor, size: int, *, gated: bool) -> Tensor:
    """Rows of the gate and of up, or of the only half."""
    return torch.cat([kept, kept + size]) if gated else kept


def _attention(model: ModelConfig, heads: Tensor) -> dict[str, Tensor]:
    """Of `linear_qkv`, which has its query heads, the key's and the value's for each group, and of
    `linear_proj`, which has the query heads.
    """
    n, g, d = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert n is not None and g is not None and d is not None
    channels = torch.arange(d)
    of_group, rows = n // g, []
    for group in range(g):
        mine = heads[heads // of_group == group] - group * of_group
        of = torch.cat([mine, torch.tensor([of_group, of_group + 1])]) + group * (of_group + 2)
        rows.append(of)
    qkv = torch.cat(rows)
    return {
        _QUERY: (heads[:, None] * d + channels).flatten(),
        _QKV: (qkv[:, None] * d + channels).flatten(),
    }
