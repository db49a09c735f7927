"""Mamba-2 (`mamba2`): Mamba-2 layers only, as in mamba2-130m to 2.7b and Codestral Mamba."""

from typing import Any

from checkpoints_converter import layers
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
from checkpoints_converter.mamba_fields import (
    DRAWN,
    GROUPED_NORM_SINCE,
    MambaNames,
    cannot_hold_mamba,
    mamba_config,
    mamba_model,
    mamba_rules,
    note_residual,
)
from checkpoints_converter.weights import Mapping, Names, renamed
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MAMBA, parse_pattern

NAMES = MambaNames(
    epsilon=("layer_norm_epsilon", 1e-5), heads=("num_heads", 128), head_dim=("head_dim", 64),
    states=("state_size", 128), groups=("n_groups", 8), expand=("expand", 2),
    conv_kernel="conv_kernel", conv_bias="use_conv_bias", proj_bias="use_bias",
    chunk_size="chunk_size",
)  # fmt: skip


def _all_mamba(value: Any) -> list[str]:
    if isinstance(value, list) and set(map(str, value)) <= {"linear_attention", "mamba"}:
        return value
    raise ValueError("must be a list of linear_attention only")


FIELDS: Rules = {
    **COMMON,
    **mamba_rules(NAMES),
    "vocab_size": Whole(default=32768),
    "hidden_size": Whole(default=4096),
    "num_hidden_layers": Whole(default=64, most=MOST_LAYERS),
    "layer_norm_epsilon": Number(default=1e-5, above=0),
    "hidden_act": MustBe(default="silu", allowed=("silu", "swish"), why="the gate is a silu"),
    "initializer_range": Number(default=0.1, above=0),
    "layer_types": Parsed(function=_all_mamba, nullable=True),
    "residual_in_fp32": Flag(default=True),
    "intermediate_size": NoEffect("expand says it"),
    "rms_norm": MustBe(default=True, allowed=(True,), why="norms are RMSNorm here"),
    **dict.fromkeys(
        ("rope_theta", "rope_scaling", "partial_rotary_factor"), NoEffect("there is no attention")
    ),
    # Whatever files say: mixers of transformers have always applied the gate first.
    "norm_before_gate": NoEffect("the gate comes first"),
    **dict.fromkeys(
        ("time_step_scale", "time_step_init_scheme", "rescale_prenorm_residual"), DRAWN
    ),
}  # fmt: skip


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' mamba2 cannot compute what a model of ours computes."""
    pattern = parse_pattern(model.hybrid_layer_pattern).layers
    if set(pattern) != {MAMBA}:
        return [f"model.hybrid_layer_pattern={pattern!r} must be of 'M' only"]
    return cannot_hold_mamba(model)


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    return mamba_config(model, NAMES) | {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": parse_pattern(model.hybrid_layer_pattern).num_layers,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": False,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    note_residual(fields)
    return {
        "hybrid_layer_pattern": MAMBA * fields["num_hidden_layers"],
        "hidden_size": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "layernorm_epsilon": fields["layer_norm_epsilon"],
        "init_method_std": fields["initializer_range"],
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        **mamba_model(fields, NAMES, fields["hidden_size"]),
    }


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model."""
    mappings = layers.vocabulary(
        model, "backbone.embeddings.weight", "lm_head.weight", theirs, held_once=True
    )
    norm = ("decoder.final_norm.weight", "backbone.norm_f.weight")
    mappings.append(renamed(*norm, (model.hidden_size,)))
    for number, kind in enumerate(parse_pattern(model.hybrid_layer_pattern).layers):
        our, their = f"decoder.layers.{number}.", f"backbone.layers.{number}."
        mappings.append(layers.norm(model, kind, our, f"{their}norm.weight", ours))
        mappings += layers.mamba(model, our, f"{their}mixer.")
    return mappings


FAMILY = Family(
    "mamba2", "Mamba2ForCausalLM", cannot_hold, config, FIELDS, model, table, GROUPED_NORM_SINCE
)
