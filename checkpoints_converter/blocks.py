"""Families whose layer is a block: a mixer (Mamba-2 or attention), then an MLP; two layers of ours.

Their MLPs have a gate (SwiGLU), and their attention may have rotary positions.
"""

from typing import Any

from checkpoints_converter import layers
from checkpoints_converter.common_fields import COMMON
from checkpoints_converter.fields import (
    MOST_LAYERS,
    Fields,
    MustBe,
    Number,
    Parsed,
    Rules,
    Whole,
)
from checkpoints_converter.mamba_fields import MambaNames, cannot_hold_mamba, mamba_rules
from checkpoints_converter.weights import Mapping, Names, renamed, split
from megatron_hybrid.bounds import MOST_TOKENS
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import (
    ATTENTION,
    MAMBA,
    MLP,
    MOE,
    has_kind,
    made_of,
    parse_pattern,
)

DEFAULT_ROPE_THETA = 10000.0
_ROTARY_PERCENT = Number(above=0, below=1 + 2**-52)  # up to all
_ROPE_FIELDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# What transformers' releases have called the mixers.
MIXERS = {"linear_attention": MAMBA, "mamba": MAMBA, "full_attention": ATTENTION,
          "attention": ATTENTION}  # fmt: skip


def mamba_names(rms_norm_eps: float) -> MambaNames:
    """How these families name the fields of Mamba-2.

    Args:
        rms_norm_eps: what the field means where a file leaves it out.
    """
    return MambaNames(
        epsilon=("rms_norm_eps", rms_norm_eps), heads=("mamba_n_heads", 128),
        head_dim=("mamba_d_head", None), states=("mamba_d_state", 256),
        groups=("mamba_n_groups", 1), expand=("mamba_expand", 2), conv_kernel="mamba_d_conv",
        conv_bias="mamba_conv_bias", proj_bias="mamba_proj_bias", chunk_size="mamba_chunk_size",
    )  # fmt: skip


def blocks(model: ModelConfig) -> list[tuple[str, str]]:
    """(symbol of the mixer, symbol of what follows it) of each block."""
    pattern = parse_pattern(model.hybrid_layer_pattern).layers
    return list(zip(pattern[::2], pattern[1::2], strict=False))


def cannot_hold_blocks(
    model: ModelConfig, second: str, mixers: str = MAMBA + ATTENTION, *, by_expand: bool = True
) -> list[str]:
    """Why a family of such blocks cannot compute what a model of ours computes.

    Args:
        second: symbols that may follow a mixer, the same in every block.
        mixers: symbols that a block may begin with.
        by_expand: as of `cannot_hold_mamba`.
    """
    pattern = parse_pattern(model.hybrid_layer_pattern).layers
    kinds = set(pattern[1::2])
    if len(pattern) % 2 or set(pattern[::2]) - set(mixers) or kinds - set(second):
        choices = " or ".join(f"'{mixer}{other}'" for other in second for mixer in mixers)
        return [f"model.hybrid_layer_pattern={pattern!r} must be of {choices} only"]
    problems = cannot_hold_mamba(model, by_expand=by_expand)
    if len(kinds) > 1:
        problems.append(f"model.hybrid_layer_pattern={pattern!r} must have one kind of MLP only")
    if model.activation != "swiglu":
        problems.append(f"model.activation={model.activation} must be swiglu: its MLPs have a gate")
    if model.add_bias_linear:
        problems.append("model.add_bias_linear=true must be false: its linears have no biases")
    if model.attn_mask_type != "causal":
        problems.append(
            f"model.attn_mask_type={model.attn_mask_type} must be causal: its attention is"
        )
    if has_kind(pattern, ATTENTION) and model.window_size is not None:
        problems.append(
            f"model.window_size={list(model.window_size)} must be null: its attention has no window"
        )
    return problems


def common_config(model: ModelConfig) -> dict[str, Any]:
    """Fields of config.json that these families have in common."""
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(blocks(model)),
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    if not has_kind(model.hybrid_layer_pattern, ATTENTION):
        # Its config wants heads even where nothing has them.
        return fields | {"num_attention_heads": 1, "num_key_value_heads": 1}
    assert model.num_attention_heads is not None
    fields |= {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
    }
    if model.kv_channels != model.hidden_size / model.num_attention_heads:
        fields["head_dim"] = model.kv_channels
    return fields


def block_rules(names: MambaNames) -> Rules:
    """Rules for the fields that these families have in common."""
    return {
        **COMMON,
        **mamba_rules(names),
        "hidden_size": Whole(default=4096),
        "num_hidden_layers": Whole(default=32, most=MOST_LAYERS),
        "hidden_act": MustBe(
            default="silu", allowed=("silu", "swish"), why="the gated MLP has a silu"
        ),
        names.epsilon[0]: Number(default=names.epsilon[1], above=0),
        "initializer_range": Number(default=0.02, above=0),
        "attention_bias": MustBe(
            default=False, allowed=(False,), layers=ATTENTION, why="no biases in attention alone"
        ),
        "num_attention_heads": Whole(default=32, layers=ATTENTION),
        "num_key_value_heads": Whole(nullable=True, layers=ATTENTION),
        "head_dim": Whole(nullable=True, layers=ATTENTION),
        "attention_dropout": Number(default=0.0, least=0, below=1, layers=ATTENTION),
        "sliding_window": MustBe(
            default=None, allowed=(None,), layers=ATTENTION, why="its attention has no window"
        ),
        "rope_parameters": Parsed(
            function=_rope_parameters, nullable=True, layers=ATTENTION, also=("rope_scaling",),
            stand_in={},
        ),
        "rope_theta": Parsed(default=DEFAULT_ROPE_THETA, function=_rope_theta, layers=ATTENTION),
    }  # fmt: skip


def common_model(fields: Fields, pattern: str, names: MambaNames) -> dict[str, Any]:
    """Our fields of those of `common_config`, and of the norms' epsilon."""
    hidden_size = fields["hidden_size"]
    values: dict[str, Any] = {
        "hybrid_layer_pattern": pattern,
        "hidden_size": hidden_size,
        "vocab_size": fields["vocab_size"],
        "activation": "swiglu",
        "layernorm_epsilon": fields[names.epsilon[0]],
        "init_method_std": fields["initializer_range"],
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
    }
    if has_kind(pattern, ATTENTION):
        heads = fields["num_attention_heads"]
        if not fields.given("head_dim") and hidden_size % heads:
            fields.problems.append(
                f"num_attention_heads={heads} must divide hidden_size={hidden_size}, "
                "unless head_dim is given"
            )
        values |= {
            "num_attention_heads": heads,
            "num_query_groups": fields["num_key_value_heads"] or heads,
            "kv_channels": fields["head_dim"] or max(1, hidden_size // heads),
            "attention_dropout": fields["attention_dropout"],
        }
    return values


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of a model with rotary positions."""
    return {
        "rope_type": "default",
        "rope_theta": float(model.rotary_base),
        "partial_rotary_factor": model.rotary_percent,
    }


def _rope_parameters(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object with rope_type and rope_theta")
    # Of another type, its other fields are its own.
    if _rope_type(value) == "default" and (unknown := sorted(value.keys() - {*_ROPE_FIELDS})):
        raise ValueError(f"has {', '.join(map(str, unknown))}; allowed: {', '.join(_ROPE_FIELDS)}")
    return value


def _rope_theta(value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 1 <= value < MOST_TOKENS and value == int(value):
        return int(value)
    raise ValueError("must be a whole number of at least 1")


def _rope_type(said: dict[str, Any]) -> Any:
    return said.get("rope_type", said.get("type", "default"))


def rope_model(fields: Fields, partial: float) -> dict[str, Any]:
    """Our fields of the rotary positions, which releases have written in several ways.

    Args:
        partial: the share of a head's channels that rotate, where the file does not say.
    """
    said = fields["rope_parameters"] or {}
    if (kind := _rope_type(said)) != "default":
        fields.problems.append(
            f"rope_type={kind!r} must be 'default': rotary frequencies are not scaled here"
        )
        said = {}
    if fields.given("rope_theta") and said.get("rope_theta") not in (None, fields["rope_theta"]):
        fields.refuse("rope_theta", f"and rope_parameters' {said['rope_theta']!r} differ")
    try:
        theta = _rope_theta(said.get("rope_theta", fields["rope_theta"]))
    except ValueError as error:
        theta = int(DEFAULT_ROPE_THETA)
        fields.problems.append(f"rope_parameters: rope_theta={said['rope_theta']!r} {error}")
    try:
        percent = _ROTARY_PERCENT.read(said.get("partial_rotary_factor", partial))
    except ValueError as error:
        percent = partial
        value = said["partial_rotary_factor"]
        fields.problems.append(f"rope_parameters: partial_rotary_factor={value!r} {error}")
    return {
        "position_embedding_type": "rope",
        "rotary_base": theta,
        "rotary_percent": percent,
    }


def common_table(
    model: ModelConfig, ours: Names, theirs: Names, final_norm: str, second_norm: str
) -> list[Mapping]:
    """Vocabulary, norms and mixers of every block; the rest of a block is the family's own.

    Args:
        final_norm: the whole name of the last norm.
        second_norm: what the norm before a block's MLP is called, without the prefix.
    """
    h = model.hidden_size
    mappings = layers.vocabulary(
        model, "model.embed_tokens.weight", "lm_head.weight", theirs, held_once=True
    )
    mappings.append(renamed("decoder.final_norm.weight", final_norm, (h,)))
    for number, (mixer, second) in enumerate(blocks(model)):
        (our, our_second), their = prefixes(number)
        first_norm = f"{their}input_layernorm.weight"
        mappings.append(layers.norm(model, mixer, our, first_norm, ours))
        mappings.append(
            layers.norm(model, second, our_second, f"{their}{second_norm}.weight", ours)
        )
        if MAMBA in made_of(mixer):
            mappings += layers.mamba(model, our, f"{their}mamba.")
        if ATTENTION in made_of(mixer):
            mappings += layers.attention(model, our, f"{their}self_attn.")
    return mappings


def feed_forward(model: ModelConfig) -> list[Mapping]:
    """The MLP of every block, its gate and up [f, h] apart."""
    h, f = model.hidden_size, model.ffn_hidden_size
    assert f is not None
    mappings = []
    for number in range(len(blocks(model))):
        (_, our), block = prefixes(number)
        their = f"{block}feed_forward."
        gate, up = ((f"{their}{name}_proj.weight", (f, h)) for name in ("gate", "up"))
        mappings.append(split(f"{our}mlp.linear_fc1.weight", [gate, up]))
        down = (f"{our}mlp.linear_fc2.weight", f"{their}down_proj.weight")
        mappings.append(renamed(*down, (h, f)))
    return mappings


def prefixes(number: int) -> tuple[tuple[str, str], str]:
    """((of our layer with the mixer, of the one after it), of their block)."""
    ours = f"decoder.layers.{2 * number}.", f"decoder.layers.{2 * number + 1}."
    return ours, f"model.layers.{number}."


def read_mixers(value: Any) -> str:
    """A symbol for each of a list of mixers.

    Raises:
        ValueError: it is no such list.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of {', '.join(MIXERS)}")
    unknown = sorted({str(name) for name in value if str(name) not in MIXERS})
    if unknown:
        raise ValueError(f"has {', '.join(unknown)}; allowed: {', '.join(MIXERS)}")
    return "".join(MIXERS[name] for name in value)


def block_pattern(mixers: str, has_experts: bool) -> str:
    """Our pattern of their mixers, one symbol a block."""
    return "".join(mixer + (MOE if has_experts else MLP) for mixer in mixers)
