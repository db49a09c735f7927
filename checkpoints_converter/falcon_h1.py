"""Falcon-H1 (`falcon_h1`): blocks of attention and Mamba-2 side by side, each with a gated MLP.

What layers compute is multiplied with factors of muP, fields of our model under the same names.
"""

from typing import Any

from checkpoints_converter.blocks import (
    block_rules,
    blocks,
    cannot_hold_blocks,
    common_config,
    common_model,
    common_table,
    feed_forward,
    mamba_names,
    rope_config,
    rope_model,
)
from checkpoints_converter.family import Family
from checkpoints_converter.fields import (
    Fields,
    Flag,
    MustBe,
    NoEffect,
    Number,
    Parsed,
    Rules,
    Whole,
)
from checkpoints_converter.mamba_fields import mamba_config, mamba_sizes, refuse_other_epsilon
from checkpoints_converter.weights import Mapping, Names
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MLP, PARALLEL

NAMES = mamba_names(rms_norm_eps=1e-5)
# One number each, by the same name on both sides.
FACTORS = (
    "key_multiplier", "attention_in_multiplier", "attention_out_multiplier", "ssm_in_multiplier",
    "ssm_out_multiplier", "embedding_multiplier", "lm_head_multiplier",
)  # fmt: skip
_LISTS = {"ssm_multipliers": 5, "mlp_multipliers": 2}  # of z, x, B, C, dt; of gate and output


def _factors(count: int) -> Parsed:
    """A rule for so many numbers."""

    def read(value: Any) -> tuple[float, ...]:
        if isinstance(value, list | tuple) and len(value) == count:
            return tuple(Number(above=0).read(each) for each in value)
        raise ValueError(f"must be {count} numbers above 0")

    return Parsed(function=read, nullable=True)


FIELDS: Rules = {
    **block_rules(NAMES),
    "vocab_size": Whole(default=128000),
    "intermediate_size": Whole(default=14336),
    "max_position_embeddings": Whole(default=8192),
    "num_key_value_heads": Whole(default=8, nullable=True, layers=ATTENTION),
    "mlp_bias": MustBe(default=False, allowed=(False,), why="biases of MLP layers alone"),
    "projectors_bias": MustBe(
        default=False, allowed=(False,), why="Mamba projections have no biases here"
    ),
    "mamba_d_ssm": Whole(default=1024, nullable=True),
    "mamba_rms_norm": Flag(default=False),
    # Held against the order here where there is a norm.
    "mamba_norm_before_gate": Flag(default=True),
    **dict.fromkeys(FACTORS, Number(default=1.0, above=0)),
    **{name: _factors(count) for name, count in _LISTS.items()},
    # Which published files say.
    "attn_layer_indices": MustBe(default=None, allowed=(None,), why="all layers have both mixers"),
    "mamba_use_mlp": MustBe(default=True, allowed=(True,), why="each block has an MLP"),
    "layers_block_type": NoEffect("all layers have both mixers", also=("layer_types",)),
    "partial_rotary_factor": NoEffect("all channels of a head rotate"),
}


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' falcon_h1 cannot compute what a model of ours computes."""
    problems = cannot_hold_blocks(model, MLP, PARALLEL, by_expand=False)
    allowed: dict[str, tuple[Any, str]] = {
        "position_embedding_type": ("rope", "its attention has rotary positions"),
        "rotary_percent": (1.0, "all its channels rotate"),
    }
    return problems + [
        f"model.{name}={getattr(model, name)} must be {value}: {why}"
        for name, (value, why) in allowed.items()
        if getattr(model, name) != value
    ]


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    assert model.mamba_num_heads is not None
    fields = mamba_config(model, NAMES) | common_config(model)
    fields |= {name: getattr(model, name) for name in FACTORS}
    fields |= {name: list(getattr(model, name)) for name in _LISTS}
    del fields[NAMES.expand[0]]
    return fields | {
        "num_hidden_layers": len(blocks(model)),
        "intermediate_size": model.ffn_hidden_size,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_d_ssm": model.mamba_num_heads * model.mamba_head_dim,
        "mamba_rms_norm": model.mamba_rms_norm,
        "mamba_norm_before_gate": False,
        "rope_parameters": rope_config(model),
    }


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    values = common_model(fields, (PARALLEL + MLP) * fields["num_hidden_layers"], NAMES)
    values["ffn_hidden_size"] = fields["intermediate_size"]
    values |= rope_model(fields, partial=1.0)
    values["rotary_percent"] = 1.0  # transformers does not read it either
    inner, whose = fields["mamba_d_ssm"], "mamba_d_ssm"  # where it is said, nothing else is read
    if inner is None:
        inner = fields["mamba_expand"] * values["hidden_size"]
        whose = "mamba_expand * hidden_size"
    values |= mamba_sizes(fields, NAMES, inner, whose)
    normed = values["mamba_rms_norm"] = fields["mamba_rms_norm"]
    if normed:
        refuse_other_epsilon(fields, NAMES.epsilon[0])
        if fields["mamba_norm_before_gate"]:
            fields.refuse(
                "mamba_norm_before_gate",
                "must be False with mamba_rms_norm=True: here the gate comes first",
            )
    values |= {name: fields[name] for name in FACTORS}
    return values | {name: fields[name] or (1.0,) * count for name, count in _LISTS.items()}


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model."""
    norms = ("model.final_layernorm.weight", "pre_ff_layernorm")
    return common_table(model, ours, theirs, *norms) + feed_forward(model)


FAMILY = Family(
    "falcon_h1",
    "FalconH1ForCausalLM",
    cannot_hold,
    config,
    FIELDS,
    model,
    table,
    multiplied=(*FACTORS, *_LISTS, "mamba_rms_norm"),
    parallel_heads=True,
)
