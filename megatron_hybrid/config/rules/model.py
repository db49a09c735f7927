"""Rules of the network itself, whatever it runs on."""

from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.layer_entries import mamba_versions
from megatron_hybrid.config.layers import MULTIPLIED, Layer, layers_of, mamba_layers, shown_size
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    MAMBA,
    MLP,
    MOE,
    PARALLEL,
    has_kind,
    having,
    recurrent_symbols,
)
from megatron_hybrid.config.rules.common import (
    Facts,
    Problems,
    Rule,
    listing,
    must_divide,
)
from megatron_hybrid.config.run import RunConfig

_MOE_FIELDS = tuple(
    name for name in fields() if name.startswith(("model.moe_", "model.num_moe_experts"))
)
_SHARED = "moe_shared_expert_intermediate_size"


def attention_heads(c: RunConfig, _: Facts) -> Problems:
    """Heads share keys and values in whole groups."""
    for layer in layers_of(c.model, ATTENTION):
        heads, groups = layer.model.num_attention_heads, layer.model.num_query_groups
        assert heads is not None and groups is not None
        yield from must_divide(
            layer.path("num_query_groups"), groups, layer.path("num_attention_heads"), heads
        )


def attention_window(c: RunConfig, _: Facts) -> Problems:
    """A window belongs to attention layers and looks back only."""
    pattern, window = c.model.hybrid_layer_pattern, c.model.window_size
    if window is not None and not has_kind(pattern, ATTENTION):
        yield (
            f"model.window_size={list(window)} needs a '*' or 'H' layer in "
            f"model.hybrid_layer_pattern={pattern!r}; allowed: null"
        )
    windows = {layer.path("window_size"): layer.model for layer in layers_of(c.model, ATTENTION)}
    for path, model in ({"model.window_size": c.model} | windows).items():
        window = model.window_size
        if window is not None and (window[0] < 1 or window[1] != 0):
            yield (
                f"{path}={list(window)} must be [tokens to the left, 0], as the model is "
                "causal; allowed: [1, 0] and more"
            )


def attention_mask(c: RunConfig, _: Facts) -> Problems:
    """Where every token sees every other, no layer may read from left to right."""
    if c.model.attn_mask_type == "causal":
        return
    pattern = c.model.hybrid_layer_pattern
    if recurrent := recurrent_symbols(pattern):
        named = " and ".join(map(repr, recurrent))
        yield (
            f"model.attn_mask_type=no_mask needs a pattern without {named} layers, which read "
            f"from left to right; model.hybrid_layer_pattern={pattern!r}; allowed: causal"
        )
    elif not has_kind(pattern, ATTENTION):
        yield (
            "model.attn_mask_type=no_mask needs a '*' or 'H' layer in "
            f"model.hybrid_layer_pattern={pattern!r}; allowed: causal"
        )
    windows = {layer.path("window_size"): layer.model for layer in layers_of(c.model, ATTENTION)}
    for path, model in (windows or {"model.window_size": c.model}).items():
        if model.window_size is not None:
            yield (
                f"{path}={list(model.window_size)} looks back only; with "
                "model.attn_mask_type=no_mask, allowed: null"
            )


def rotary_channels(c: RunConfig, _: Facts) -> Problems:
    """Channels rotate in pairs."""
    for layer in layers_of(c.model, ATTENTION):
        channels = layer.model.kv_channels
        if layer.model.position_embedding_type != "rope" or channels is None:
            continue
        rotating = int(channels * c.model.rotary_percent)
        if rotating < 2 or rotating % 2:
            yield (
                f"model.rotary_percent={c.model.rotary_percent} of "
                f"{layer.path('kv_channels')}={channels} is {rotating} rotating channels; it must "
                "be an even number of at least 2"
            )


def mamba_heads(c: RunConfig, _: Facts) -> Problems:
    """Mamba-2 heads share B and C in whole groups."""
    for layer in mamba_layers(c.model, 2):
        heads = layer.model.mamba_num_heads
        assert heads is not None
        yield from must_divide(
            layer.path("mamba_num_groups"), layer.model.mamba_num_groups,
            layer.path("mamba_num_heads"), heads,
        )  # fmt: skip


def linear_heads(c: RunConfig, _: Facts) -> Problems:
    """Each key head of a gated delta net serves as many value heads as the others."""
    names = ("linear_num_key_heads", "linear_num_value_heads")
    for layer in layers_of(c.model, GDN):
        keys, values = (getattr(layer.model, name) for name in names)
        if keys is not None and values is not None:
            yield from must_divide(layer.path(names[0]), keys, layer.path(names[1]), values)
            continue
        unset = names[keys is not None]
        yield (
            f"{layer.path(unset)} is not set, and layer {layer.number} of "
            f"model.hybrid_layer_pattern={c.model.hybrid_layer_pattern!r} is a gated delta net; it "
            "must be a whole number of at least 1"
        )


def multipliers(c: RunConfig, _: Facts) -> Problems:
    """A factor needs the layers that it is of, and one on a gate an activation that has one."""
    pattern = c.model.hybrid_layer_pattern
    for name, kind in MULTIPLIED.items():
        path, value = f"model.{name}", getattr(c.model, name)
        default = fields()[path].default
        if value != default and not has_kind(pattern, kind):
            needed = " or ".join(map(repr, having(kind)))
            article = "an" if kind in (MAMBA, PARALLEL) else "a"
            yield (
                f"{path}={shown_size(value)} needs {article} {needed} layer in "
                f"model.hybrid_layer_pattern={pattern!r}; without one, allowed: "
                f"{shown_size(default)}"
            )
    gate, output = c.model.mlp_multipliers
    of_mlps = f"model.mlp_multipliers={shown_size(c.model.mlp_multipliers)}"
    if (gate, output) != (1, 1) and MLP in pattern and MOE in pattern:
        yield (
            f"{of_mlps} with 'E' layers in "
            f"model.hybrid_layer_pattern={pattern!r} is not supported: experts have "
            "none; allowed: [1.0, 1.0]"
        )
    if gate == 1:
        return
    activations = {layer.path("activation"): layer.model for layer in layers_of(c.model, MLP)}
    for path, model in activations.items():
        if model.activation != "swiglu":
            yield (
                f"{of_mlps}: the first is of the gate, of which {path}={model.activation} has "
                "none; allowed: 1.0, or swiglu"
            )


def mamba_version(c: RunConfig, _: Facts) -> Problems:
    """Only Mamba-2 has factors and a norm after the gate, only Mamba-1 norms before the scan."""
    versions = mamba_versions(c.model)
    if len(versions) != 1:
        return
    (version,) = versions
    for name in (name for name, kind in MULTIPLIED.items() if kind == MAMBA):
        of = 1 if name == "mamba_inner_layernorms" else 2
        value, default = getattr(c.model, name), fields()[f"model.{name}"].default
        if value != default and of != version:
            yield (
                f"model.{name}={shown_size(value)} needs Mamba-{of} layers, and all are "
                f"Mamba-{version}; allowed: {shown_size(default)}"
            )


def meta_tokens(c: RunConfig, _: Facts) -> Problems:
    """They are before the text, and none of its tokens."""
    pattern, count = c.model.hybrid_layer_pattern, c.model.num_meta_tokens
    metas = f"model.num_meta_tokens={count}"
    if not count:
        return
    if not recurrent_symbols(pattern) and not has_kind(pattern, ATTENTION):
        yield (
            f"{metas} needs an 'M', '*', 'H' or 'G' layer in "
            f"model.hybrid_layer_pattern={pattern!r}; allowed: 0"
        )
    if MOE in pattern:
        yield (
            f"{metas} with 'E' layers in model.hybrid_layer_pattern={pattern!r} is not supported: "
            "experts would be balanced by what is no token of a text; allowed: 0"
        )
    if c.model.attn_mask_type != "causal":
        yield (
            f"{metas} needs model.attn_mask_type=causal; it is {c.model.attn_mask_type}; allowed: 0"
        )


def moe_only_with_moe_layers(c: RunConfig, _: Facts) -> Problems:
    """MoE fields without MoE layers are a mistake somewhere."""
    pattern = c.model.hybrid_layer_pattern
    if MOE in pattern:
        return
    for path in _MOE_FIELDS:
        value = getattr(c.model, path.removeprefix("model."))
        default = fields()[path].default
        if value != default:
            yield (
                f"{path}={shown(value)} needs an 'E' layer in "
                f"model.hybrid_layer_pattern={pattern!r}; without one, allowed: {shown(default)}"
            )


def moe_router(c: RunConfig, _: Facts) -> Problems:
    """What megatron-core's router can do."""
    m = c.model
    if MOE not in m.hybrid_layer_pattern:
        return
    softmax = m.moe_router_score_function == "softmax"
    for layer in layers_of(m, MOE):
        topk, experts = layer.model.moe_router_topk, layer.model.num_moe_experts
        assert experts is not None
        if topk > experts:
            yield (
                f"{layer.path('moe_router_topk')}={topk} must be at most "
                f"{layer.path('num_moe_experts')}={experts}; allowed: 1 to {experts}"
            )
        if topk == 1 and softmax and not m.moe_router_pre_softmax:
            yield (
                f"{layer.path('moe_router_topk')}=1 with model.moe_router_score_function=softmax "
                "needs model.moe_router_pre_softmax=true: a softmax over one score has no gradient"
            )
        yield from _expert_groups(layer)
    if m.moe_router_pre_softmax and not softmax:
        yield (
            "model.moe_router_pre_softmax=true needs model.moe_router_score_function=softmax; "
            f"it is {m.moe_router_score_function}"
        )
    if m.moe_router_enable_expert_bias and softmax:
        yield (
            "model.moe_router_enable_expert_bias=true needs "
            "model.moe_router_score_function=sigmoid; it is softmax"
        )


def _expert_groups(layer: Layer) -> Problems:
    """Groups of equal size, of which enough are open for all experts that a token goes to."""
    m, name, open_name = layer.model, "moe_router_num_groups", "moe_router_group_topk"
    groups, open_groups, topk = m.moe_router_num_groups, m.moe_router_group_topk, m.moe_router_topk
    experts = m.num_moe_experts
    assert experts is not None
    if (groups is None) != (open_groups is None):
        here, other = (name, open_name) if open_groups is None else (open_name, name)
        yield (
            f"{layer.path(here)}={getattr(m, here)} needs {layer.path(other)}, which is null; "
            "allowed: null, or both"
        )
    if groups is None or open_groups is None:
        return
    if experts % groups:
        yield from must_divide(layer.path(name), groups, layer.path("num_moe_experts"), experts)
        return
    size, most = experts // groups, min(groups, topk)
    fits = [n for n in range(1, most + 1) if topk <= n * size and topk // n <= size]
    if open_groups not in fits:
        allowed = listing(fits) or "none: set moe_router_num_groups lower"
        yield (
            f"{layer.path(open_name)}={open_groups} of {layer.path(name)}={groups} must hold "
            f"{layer.path('moe_router_topk')}={topk} experts, in groups of {size}; allowed: "
            f"{allowed}"
        )


def moe_balance(c: RunConfig, _: Facts) -> Problems:
    """A loss that is never computed must not have a weight."""
    m = c.model
    if m.moe_router_load_balancing_type == "none" and m.moe_aux_loss_coeff > 0:
        yield (
            f"model.moe_aux_loss_coeff={m.moe_aux_loss_coeff} needs "
            "model.moe_router_load_balancing_type=aux_loss or seq_aux_loss; it is none"
        )


def moe_shared_bias(c: RunConfig, _: Facts) -> Problems:
    """megatron-core's shared experts have no biases."""
    shared = {
        layer.path(_SHARED): layer.model.moe_shared_expert_intermediate_size
        for layer in layers_of(c.model, MOE)
    }
    for path, width in shared.items():
        if width is not None and c.model.add_bias_linear:
            yield (
                f"model.add_bias_linear=true must be false with {path}={width}: shared experts "
                "have no biases"
            )


MODEL: tuple[Rule, ...] = (
    attention_heads,
    attention_window,
    attention_mask,
    rotary_channels,
    mamba_heads,
    linear_heads,
    mamba_version,
    meta_tokens,
    multipliers,
    moe_only_with_moe_layers,
    moe_router,
    moe_balance,
    moe_shared_bias,
)
