"""Hymba (`hymba`): blocks of attention and Mamba-1 side by side, each with an MLP; meta tokens.

Released as nvidia/Hymba-1.5B with code of its own; transformers has no such model. Layer i of it is
layers 2i + 1 and 2i + 2 of ours.

Legend of shapes: h hidden size; q query and g key/value heads of c channels, their values of v; d =
q * v channels of Mamba, n states, r rank of its steps; f inner width of an MLP; m meta tokens.
"""

import math
from typing import Any

from checkpoints_converter import layers
from checkpoints_converter.blocks import blocks, prefixes
from checkpoints_converter.common_fields import COMMON
from checkpoints_converter.family import Family
from checkpoints_converter.fields import (
    MOST_LAYERS,
    Fields,
    Flag,
    MustBe,
    NoEffect,
    Number,
    Parsed,
    Rules,
    Whole,
)
from checkpoints_converter.weights import Mapping, Names, concatenated, renamed, split
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import Layer, producers, shown_size
from megatron_hybrid.config.layers import layers as resolved
from megatron_hybrid.config.linears import value_channels
from megatron_hybrid.config.pattern import MLP, PARALLEL, parse_pattern
from megatron_hybrid.model.counts import CONV_KERNEL

_ACTIVATIONS = {"silu": "swiglu", "relu2": "squared_relu"}
# Of attention and Mamba; others may differ from layer to layer.
_ALIKE = (
    "num_attention_heads", "num_query_groups", "kv_channels", "position_embedding_type",
    "mamba_version", "mamba_state_dim", "mamba_intermediate_size", "mamba_dt_rank",
)  # fmt: skip


def _rank(value: Any) -> int | None:
    if value == "auto":
        return None
    return Whole().parse(value)


def _indices(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [Whole(least=0, most=MOST_LAYERS).parse(each) for each in value]
    raise ValueError("must be a list of layers, from 0")


def _groups(value: Any) -> list[list[int]]:
    if isinstance(value, list | tuple):
        return [_indices(each) for each in value]
    raise ValueError("must be a list of lists of layers, from 0")


FIELDS: Rules = {
    **COMMON,
    "vocab_size": Whole(default=65536),
    "hidden_size": Whole(default=4096),
    "intermediate_size": Whole(default=14336),
    "num_hidden_layers": Whole(default=32, most=MOST_LAYERS),
    "num_attention_heads": Whole(default=32),
    "num_key_value_heads": Whole(default=8, nullable=True),
    "hidden_act": MustBe(default="silu", allowed=("silu",), why="Mamba-1 has a silu"),
    "mlp_hidden_act": MustBe(
        default="silu", allowed=_ACTIVATIONS, why="its MLPs have one of these"
    ),
    "initializer_range": Number(default=0.02, above=0),
    "rms_norm_eps": Number(default=1e-6, above=0),
    "attention_dropout": Number(default=0.0, least=0, below=1),
    "sliding_window": Whole(nullable=True),
    "global_attn_idx": Parsed(function=_indices, nullable=True),
    "kv_reuse_group": Parsed(function=_groups, nullable=True),
    "kv_reuse_every_i_layer": MustBe(
        default=-1, allowed=(-1,), why="kv_reuse_group says which layers share keys and values"
    ),
    "kv_weight_reuse": MustBe(
        default=False, allowed=(False,), why="each projection has weights of its own"
    ),
    "attn_implementation_new": MustBe(
        default="sdpa", allowed=("flex",), why="the others hide meta tokens outside a window"
    ),
    "num_memory_tokens": Whole(default=0),
    "memory_tokens_interspersed_every": MustBe(
        default=0, allowed=(0,), why="meta tokens stand before a text alone"
    ),
    "rope": MustBe(default=False, allowed=(True,), why="its attention has rotary positions"),
    "rope_type": MustBe(
        default=None,
        allowed={None: "default", "default": "default", "ntk": "ntk"},
        why="other scalings change with the length of a text",
    ),
    "rope_theta": Number(default=10000.0, least=1),
    "orig_max_position_embeddings": Whole(nullable=True),
    "attn_hidden_size": MustBe(default=-1, allowed=(-1, 0), why="queries are as wide as a token"),
    "kq_head_dim": MustBe(default=-1, allowed=(-1, 0), why="queries are as wide as a token"),
    "v_head_dim": NoEffect("it follows from the channels of Mamba"),
    "kq_norm": MustBe(default=None, allowed=("none",), why="queries and keys have no norms here"),
    "mamba_d_state": Whole(default=16),
    "mamba_d_conv": MustBe(
        default=4, allowed=(CONV_KERNEL,), why="the convolution's length is fixed"
    ),
    "mamba_expand": Whole(default=2),
    "mamba_dt_rank": Parsed(default="auto", function=_rank),
    "mamba_conv_bias": MustBe(
        default=True, allowed=(True,), why="the convolution always has a bias"
    ),
    "mamba_proj_bias": MustBe(
        default=False, allowed=(False,), why="projections have no biases here"
    ),
    "mamba_inner_layernorms": Flag(default=True),
    "num_mamba": MustBe(default=1, allowed=(1,), why="a block has one Mamba mixer"),
    **dict.fromkeys(
        ("num_experts", "num_experts_per_tok", "router_aux_loss_coef"),
        NoEffect("each block has one MLP, whatever they say"),
    ),
    **dict.fromkeys(
        ("calc_logits_for_entire_prompt", "seq_length", "layer_type", "conv_dim"),
        NoEffect("of the program that runs it"),
    ),
}  # fmt: skip


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why Hymba's code cannot compute what a model of ours computes."""
    pattern = parse_pattern(model.hybrid_layer_pattern).layers
    if len(pattern) % 2 or set(pattern[::2]) != {PARALLEL} or set(pattern[1::2]) != {MLP}:
        return [f"model.hybrid_layer_pattern={pattern!r} must be of '{PARALLEL}{MLP}' only"]
    every = resolved(model)
    heads, mlps = every[::2], every[1::2]
    first = heads[0].model
    fixed: dict[str, tuple[Any, str]] = {
        "parallel_heads_join": ("mean", "the outputs of both mixers are averaged"),
        "attn_mask_type": ("causal", "its attention is"),
        "add_bias_linear": (False, "its linears have no biases"),
        "rotary_percent": (1.0, "all its channels rotate"),
    }
    problems = [
        f"model.{name}={shown_size(getattr(model, name))} must be {shown_size(value)}: {why}"
        for name, (value, why) in fixed.items()
        if getattr(model, name) != value
    ]
    if model.num_meta_tokens < 1:
        problems.append("model.num_meta_tokens=0 must be at least 1: its attention wants some")
    problems += _unlike(heads, _ALIKE) + _unlike(mlps, ("ffn_hidden_size", "activation"))
    if problems:
        return problems
    if first.position_embedding_type != "rope":
        problems.append(f"{heads[0].path('position_embedding_type')}=none must be rope")
    if mlps[0].model.activation not in _ACTIVATIONS.values():
        problems.append(
            f"{mlps[0].path('activation')}={mlps[0].model.activation} must be "
            f"{' or '.join(_ACTIVATIONS.values())}"
        )
    assert first.num_attention_heads is not None and first.kv_channels is not None
    if first.num_attention_heads * first.kv_channels != model.hidden_size:
        problems.append(
            f"{heads[0].path('num_attention_heads')}={first.num_attention_heads} of "
            f"{heads[0].path('kv_channels')}={first.kv_channels} must make "
            f"model.hidden_size={model.hidden_size}"
        )
    assert first.mamba_intermediate_size is not None
    if first.mamba_intermediate_size % model.hidden_size:
        problems.append(
            f"{heads[0].path('mamba_intermediate_size')}={first.mamba_intermediate_size} must be "
            f"a multiple of model.hidden_size={model.hidden_size}: it says it so"
        )
    windows = sorted({each.model.window_size for each in heads if each.model.window_size})
    if len(windows) > 1:
        problems.append(
            f"windows {', '.join(map(shown_size, windows))} must be one: others see all"
        )
    return problems


def _unlike(of_kind: tuple[Layer, ...], names: tuple[str, ...]) -> list[str]:
    first = of_kind[0]
    return [
        f"{other.path(name)}={shown_size(getattr(other.model, name))} of layer {other.number} must "
        f"be {shown_size(getattr(first.model, name))}, as of layer {first.number}"
        for name in names
        for other in of_kind
        if getattr(other.model, name) != getattr(first.model, name)
    ]


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    every = resolved(model)
    heads, m = every[::2], every[0].model
    assert m.mamba_intermediate_size is not None
    windows = {each.model.window_size[0] for each in heads if each.model.window_size is not None}
    groups: dict[int, list[int]] = {}
    for number, producer in producers(model).items():
        assert producer is not None
        groups.setdefault(producer.number, [producer.number // 2]).append(number // 2)
    activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": every[1].model.ffn_hidden_size,
        "num_hidden_layers": len(heads),
        "num_attention_heads": m.num_attention_heads,
        "num_key_value_heads": m.num_query_groups,
        "hidden_act": "silu",
        "mlp_hidden_act": activations[every[1].model.activation],
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "sliding_window": next(iter(windows), None),
        "global_attn_idx": [
            each.number // 2 for each in heads if windows and each.model.window_size is None
        ],
        "kv_reuse_group": list(groups.values()) or None,
        "kv_reuse_every_i_layer": -1,
        "kv_weight_reuse": False,
        "attn_implementation_new": "flex",
        "num_memory_tokens": model.num_meta_tokens,
        "memory_tokens_interspersed_every": 0,
        "rope": True,
        "rope_type": "default",
        "rope_theta": float(model.rotary_base),
        "attn_hidden_size": -1,
        "kq_head_dim": -1,
        "kq_norm": "none",
        "mamba_d_state": m.mamba_state_dim,
        "mamba_d_conv": CONV_KERNEL,
        "mamba_expand": m.mamba_intermediate_size // model.hidden_size,
        "mamba_dt_rank": m.mamba_dt_rank,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_inner_layernorms": model.mamba_inner_layernorms,
        "num_mamba": 1,
    }


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    hidden, heads, count = (
        fields["hidden_size"], fields["num_attention_heads"], fields["num_hidden_layers"],
    )  # fmt: skip
    if hidden % heads:
        fields.refuse("num_attention_heads", f"must divide hidden_size={hidden}")
    channels, rank = max(1, hidden // heads), fields["mamba_dt_rank"]
    window = fields["sliding_window"]
    if fields["global_attn_idx"] is None:
        window = None  # all layers see all
    return {
        "hybrid_layer_pattern": (PARALLEL + MLP) * count,
        "hidden_size": hidden,
        "vocab_size": fields["vocab_size"],
        "ffn_hidden_size": fields["intermediate_size"],
        "activation": fields["mlp_hidden_act"],
        "num_attention_heads": heads,
        "num_query_groups": fields["num_key_value_heads"] or heads,
        "kv_channels": channels,
        "attention_dropout": fields["attention_dropout"],
        "window_size": None if window is None else [window, 0],
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(fields, channels),
        "parallel_heads_join": "mean",
        "mamba_version": 1,
        "mamba_state_dim": fields["mamba_d_state"],
        "mamba_intermediate_size": fields["mamba_expand"] * hidden,
        "mamba_dt_rank": math.ceil(hidden / 16) if rank is None else rank,
        "mamba_inner_layernorms": fields["mamba_inner_layernorms"],
        "num_meta_tokens": fields["num_memory_tokens"],
        "layernorm_epsilon": fields["rms_norm_eps"],
        "init_method_std": fields["initializer_range"],
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        "layers": _layers(fields, count, has_window=window is not None),
    }


def _rotary_base(fields: Fields, channels: int) -> float:
    """Of NTK scaling, by which its code makes longer texts of a model's first length."""
    theta: float = fields["rope_theta"]
    if fields["rope_type"] != "ntk":
        return theta
    most, first = fields["max_position_embeddings"], fields["orig_max_position_embeddings"]
    if most is None or first is None or channels < 4 or 2 * most <= first:
        fields.refuse(
            "rope_type",
            f"needs max_position_embeddings={most} and orig_max_position_embeddings={first}, and "
            f"heads of more than {channels} channels",
        )
        return theta
    return float(theta * (2 * most / first - 1) ** (channels / (channels - 2)))


def _layers(fields: Fields, count: int, *, has_window: bool) -> dict[str, dict[str, Any]]:
    """What is other in some layers: those that see all, those that reuse keys and values."""
    found: dict[str, dict[str, Any]] = {}
    for name, told in (
        ("global_attn_idx", fields["global_attn_idx"] or []),
        ("kv_reuse_group", [each for group in fields["kv_reuse_group"] or [] for each in group]),
    ):
        if any(each >= count for each in told):
            fields.refuse(name, f"must be of the {count} layers, from 0")
            return {}
    for each in fields["global_attn_idx"] or [] if has_window else []:
        found.setdefault(str(2 * each + 1), {})["window_size"] = None
    groups = fields["kv_reuse_group"] or []
    reusing = {each: group[0] for group in groups for each in group[1:]}
    for each, producer in reusing.items():
        nearest = next((i for i in range(each - 1, -1, -1) if i not in reusing), None)
        if producer != nearest:
            fields.refuse(
                "kv_reuse_group",
                f"must have layer {each} share with the nearest one before it that has keys and "
                f"values, which is {nearest}",
            )
        found.setdefault(str(2 * each + 1), {})["reuse_kv"] = True
    return found


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model."""
    h, every = model.hidden_size, resolved(model)
    mappings = layers.vocabulary(
        model, "model.embed_tokens.weight", "lm_head.weight", theirs, held_once=True
    )
    mappings += [
        renamed("embedding.meta_tokens", "model.memory_tokens", (model.num_meta_tokens, h)),
        renamed("decoder.final_norm.weight", "model.final_layernorm.weight", (h,)),
    ]
    for number in range(len(blocks(model))):
        (our, our_mlp), their = prefixes(number)
        first_norm = "mixer.in_proj.layer_norm_weight"
        mappings.append(renamed(our + first_norm, f"{their}input_layernorm.weight", (h,)))
        mappings += _mixers(every[2 * number].model, f"{our}mixer.", f"{their}mamba.")
        second_norm = f"{their}pre_moe_layernorm.weight"
        mappings.append(layers.norm(model, MLP, our_mlp, second_norm, ours))
        mappings += _mlp(every[2 * number + 1].model, f"{our_mlp}mlp.", f"{their}moe.experts.0.")
    return mappings


def _mixers(m: ModelConfig, our: str, their: str) -> list[Mapping]:
    """in_proj [q*c + g*c + g*v + 2d, h] is packed q, k, v, x, z; without k and v where reused."""
    heads, groups, channels = m.num_attention_heads, m.num_query_groups, m.kv_channels
    d, rank, n, h = m.mamba_intermediate_size, m.mamba_dt_rank, m.mamba_state_dim, m.hidden_size
    assert heads is not None and groups is not None and channels is not None
    assert d is not None and rank is not None
    rows = {"q": heads * channels}
    if not m.reuse_kv:
        rows |= {"k": groups * channels, "v": groups * value_channels(m, PARALLEL)}
    rows |= {"x": d, "z": d}
    packed = [(f"{our}in_proj.weight.{part}", (count, h)) for part, count in rows.items()]
    inner = {"dt_layernorm": rank, "B_layernorm": n, "C_layernorm": n}
    same: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv1d.weight": ("conv1d.weight", (d, 1, CONV_KERNEL)),
        "conv1d.bias": ("conv1d.bias", (d,)),
        "x_proj.weight": ("x_proj.0.weight", (rank + 2 * n, d)),
        "dt_proj.weight": ("dt_proj.0.weight", (d, rank)),
        "attention_norm.weight": ("pre_avg_layernorm1.weight", (d,)),
        "ssm_norm.weight": ("pre_avg_layernorm2.weight", (d,)),
        "out_proj.weight": ("out_proj.weight", (h, d)),
    }
    if m.mamba_inner_layernorms:
        same |= {f"{name}.weight": (f"{name}.weight", (size,)) for name, size in inner.items()}
    in_fp32 = {"dt_bias": ("dt_proj.0.bias", (d,)), "A_log": ("A_log.0", (d, n)),
               "D": ("D.0", (d,))}  # fmt: skip
    return [
        concatenated(packed, f"{their}in_proj.weight"),
        *(renamed(our + ours, their + name, shape) for ours, (name, shape) in same.items()),
        *(
            renamed(our + ours, their + name, shape, fp32=True)
            for ours, (name, shape) in in_fp32.items()
        ),
    ]


def _mlp(m: ModelConfig, our: str, their: str) -> list[Mapping]:
    """Gate and up [f, h] apart, or up alone."""
    h, f = m.hidden_size, m.ffn_hidden_size
    assert f is not None
    if m.activation == "squared_relu":
        return layers.mlp(our, their, h, f)
    gate, up = ((f"{their}{name}_proj.weight", (f, h)) for name in ("gate", "up"))
    down = renamed(f"{our}linear_fc2.weight", f"{their}down_proj.weight", (h, f))
    return [split(f"{our}linear_fc1.weight", [gate, up]), down]


FAMILY = Family(
    "hymba",
    "HymbaForCausalLM",
    cannot_hold,
    config,
    FIELDS,
    model,
    table,
    multiplied=("mamba_inner_layernorms", "parallel_heads_join", "num_meta_tokens"),
    parallel_heads=True,
    takes_unlike=True,
    in_transformers=False,
)
