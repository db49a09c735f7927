"""Bamba (`bamba`): blocks of Mamba-2 or rotary attention, each with a gated MLP."""

from typing import Any

from checkpoints_converter.blocks import (
    block_pattern,
    blocks,
    cannot_hold_blocks,
    common_config,
    common_model,
    common_table,
    mamba_names,
    prefixes,
    rope_config,
    rope_model,
)
from checkpoints_converter.family import Family, Fields
from checkpoints_converter.mamba_fields import mamba_config, mamba_model
from checkpoints_converter.weights import Mapping, Names, renamed, split
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP

NAMES = mamba_names(rms_norm_eps=1e-5)
PARTIAL_ROTARY_FACTOR = 0.5  # in transformers, unless the file says otherwise


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
    """Our model section of a config.json; defaults are those of transformers' BambaConfig."""
    attention = set(fields.get("attn_layer_indices") or ())
    count = fields.size("num_hidden_layers", 32)
    mixers = "".join(ATTENTION if number in attention else MAMBA for number in range(count))
    fields.must_be("mlp_bias", False, default=False, why="biases of MLP layers alone")
    values = common_model(fields, block_pattern(fields, mixers, False), NAMES)
    values |= {
        "vocab_size": fields.size("vocab_size", 128000),
        "ffn_hidden_size": fields.size("intermediate_size", 14336),
    }
    if ATTENTION in mixers:
        values |= rope_model(fields, PARTIAL_ROTARY_FACTOR)
    if MAMBA in mixers:
        values |= mamba_model(fields, NAMES, values["hidden_size"])
    return values


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model."""
    norms = ("model.final_layernorm.weight", "pre_ff_layernorm")
    mappings = common_table(model, ours, theirs, *norms)
    h, f = model.hidden_size, model.ffn_hidden_size
    assert f is not None
    for number in range(len(blocks(model))):
        (_, our), block = prefixes(number)
        their = f"{block}feed_forward."
        gate, up = ((f"{their}{name}_proj.weight", (f, h)) for name in ("gate", "up"))
        mappings.append(split(f"{our}mlp.linear_fc1.weight", [gate, up]))
        down = (f"{our}mlp.linear_fc2.weight", f"{their}down_proj.weight")
        mappings.append(renamed(*down, (h, f)))
    return mappings


FAMILY = Family("bamba", "BambaForCausalLM", cannot_hold, config, model, table)
