"""Bamba (`bamba`): blocks of Mamba-2 or rotary attention, each with a gated MLP."""

from typing import Any

from checkpoints_converter.blocks import (
    block_pattern,
    block_rules,
    blocks,
    cannot_hold_blocks,
    common_config,
    common_model,
    common_table,
    feed_forward,
    mamba_names,
    read_mixers,
    rope_config,
    rope_model,
)
from checkpoints_converter.family import Family
from checkpoints_converter.fields import Fields, MustBe, NoEffect, Number, Parsed, Rules, Whole
from checkpoints_converter.mamba_fields import GROUPED_NORM_SINCE, mamba_config, mamba_model
from checkpoints_converter.weights import Mapping, Names
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP

NAMES = mamba_names(rms_norm_eps=1e-5)
PARTIAL_ROTARY_FACTOR = 0.5  # in transformers, unless the file says otherwise


def _indices(value: Any) -> set[int]:
    if not isinstance(value, list):
        raise ValueError("must be a list of numbers of layers")
    return {Whole(least=0).read(index) for index in value}


FIELDS: Rules = {
    **block_rules(NAMES),
    "vocab_size": Whole(default=128000),
    "intermediate_size": Whole(default=14336),
    "max_position_embeddings": Whole(default=262144),
    "num_key_value_heads": Whole(default=8, nullable=True, layers=ATTENTION),
    "mlp_bias": MustBe(default=False, allowed=(False,), why="biases of MLP layers alone"),
    "attn_layer_indices": Parsed(function=_indices, nullable=True),
    # transformers makes it of attn_layer_indices.
    "layers_block_type": Parsed(function=read_mixers, nullable=True, also=("layer_types",)),
    # Channels of a head that rotate: other programs go by it.
    "attn_rotary_emb": Whole(nullable=True, layers=ATTENTION),
    "partial_rotary_factor": Number(nullable=True, layers=ATTENTION),
    "z_loss_coefficient": Number(default=0.0, least=0),
    "router_aux_loss_coef": NoEffect("there are no experts"),
}


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' bamba cannot compute what a model of ours computes."""
    problems = cannot_hold_blocks(model, MLP)
    if ATTENTION in model.hybrid_layer_pattern and model.position_embedding_type != "rope":
        problems.append(
            f"model.position_embedding_type={model.position_embedding_type} must be rope: "
            "its attention has rotary positions"
        )
    return problems


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    mixers = [mixer for mixer, _ in blocks(model)]
    fields = mamba_config(model, NAMES) | common_config(model)
    fields |= {
        "intermediate_size": model.ffn_hidden_size,
        "mlp_bias": False,
        "attn_layer_indices": [i for i, mixer in enumerate(mixers) if mixer == ATTENTION],
    }
    if ATTENTION in mixers:
        fields["rope_parameters"] = rope_config(model)
    return fields


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    attention, count = fields["attn_layer_indices"] or set(), fields["num_hidden_layers"]
    mixers = "".join(ATTENTION if number in attention else MAMBA for number in range(count))
    if beyond := [index for index in attention if index >= count]:
        fields.refuse("attn_layer_indices", f"has {max(beyond)}: there are {count} layers")
    if fields["layers_block_type"] not in (None, mixers):
        fields.problems.append("layers_block_type and attn_layer_indices differ")
    values = common_model(fields, block_pattern(mixers, False), NAMES)
    values["ffn_hidden_size"] = fields["intermediate_size"]
    if ATTENTION in mixers:
        values |= rope_model(fields, PARTIAL_ROTARY_FACTOR)
        rotating = values["rotary_percent"]
        if fields["partial_rotary_factor"] not in (None, rotating):
            fields.refuse("partial_rotary_factor", f"must be {rotating}, which transformers takes")
        if fields["attn_rotary_emb"] not in (None, rotating * values["kv_channels"]):
            fields.refuse(
                "attn_rotary_emb",
                f"must be {rotating * values['kv_channels']:g}: in transformers {rotating} of a "
                f"head's {values['kv_channels']} channels rotate",
            )
    if MAMBA in mixers:
        values |= mamba_model(fields, NAMES, values["hidden_size"])
    if fields["z_loss_coefficient"] > 0:
        fields.notes.append(
            f"z_loss_coefficient={fields['z_loss_coefficient']:g}: it was trained with a z-loss on "
            "its logits, which there is none of here"
        )
    return values


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model."""
    norms = ("model.final_layernorm.weight", "pre_ff_layernorm")
    return common_table(model, ours, theirs, *norms) + feed_forward(model)


FAMILY = Family(
    "bamba", "BambaForCausalLM", cannot_hold, config, FIELDS, model, table, GROUPED_NORM_SINCE
)
