"""Granite 4 (`granitemoehybrid`): blocks of Mamba-2 or attention, with gated MLPs or experts.

Only without its multipliers, which have no counterpart here; the published models have them.
"""

from typing import Any

from checkpoints_converter.blocks import (
    block_pattern,
    block_rules,
    blocks,
    cannot_hold_blocks,
    common_config,
    common_model,
    common_table,
    mamba_names,
    prefixes,
    read_mixers,
    rope_config,
    rope_model,
)
from checkpoints_converter.family import Family
from checkpoints_converter.fields import Fields, MustBe, NoEffect, Number, Parsed, Rules, Whole
from checkpoints_converter.mamba_fields import GROUPED_NORM_SINCE, mamba_config, mamba_model
from checkpoints_converter.weights import Mapping, Names, per_expert, renamed
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
NAMES = mamba_names(rms_norm_eps=1e-6)
FIELDS: Rules = {
    **block_rules(NAMES),
    "vocab_size": Whole(default=32000),
    "max_position_embeddings": Whole(default=2048),
    "layer_types": Parsed(function=read_mixers, nullable=True, also=("layers_block_type",)),
    **dict.fromkeys(
        MULTIPLIERS, MustBe(default=1.0, allowed=(1.0,), why="nothing is multiplied here")
    ),
    # Held against what we compute: the root of a head's channels.
    "attention_multiplier": Number(default=1.0, layers=ATTENTION),
    "position_embedding_type": MustBe(
        default=None, allowed=(None, "nope", "rope"), layers=ATTENTION, why="no other"
    ),
    "partial_rotary_factor": NoEffect("all channels of a head rotate"),
    "num_local_experts": Whole(default=8, least=0),
    "num_experts_per_tok": Whole(default=2, layers=MOE),
    "intermediate_size": Whole(default=11008, layers=MOE),
    "shared_intermediate_size": Whole(default=1024),
    "router_aux_loss_coef": Number(default=0.001, least=0, layers=MOE),
    "normalization_function": MustBe(
        default="rmsnorm", allowed=("rmsnorm",), why="norms are RMSNorm here"
    ),
    "init_method": NoEffect("how initial weights are drawn"),
}


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' granitemoehybrid cannot compute what a model of ours computes."""
    problems = cannot_hold_blocks(model, MLP + MOE)
    pattern = model.hybrid_layer_pattern
    rotates = ATTENTION in pattern and model.position_embedding_type == "rope"
    if rotates and model.rotary_percent != 1.0:
        problems.append(
            f"model.rotary_percent={model.rotary_percent} must be 1.0: all its channels rotate"
        )
    if MOE not in pattern:
        return problems
    allowed: dict[str, tuple[Any, str]] = {
        "moe_router_score_function": ("softmax", "its router takes a softmax"),
        "moe_router_pre_softmax": (False, "its softmax is over the chosen experts"),
        "moe_router_enable_expert_bias": (False, "its router has no bias"),
        "moe_router_topk_scaling_factor": (None, "its scores are not scaled"),
        "moe_latent_size": (None, "its experts take tokens as they are"),
        "moe_router_num_groups": (None, "its experts are in no groups"),
    }
    problems += [
        f"model.{name}={getattr(model, name)!r} must be {value!r}: {why}"
        for name, (value, why) in allowed.items()
        if getattr(model, name) != value
    ]
    if model.moe_shared_expert_intermediate_size is None:
        problems.append(
            "model.moe_shared_expert_intermediate_size=null must be a size: "
            "its MoE layers always have a shared expert"
        )
    return problems


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    mixers = [mixer for mixer, _ in blocks(model)]
    kinds = {MAMBA: "linear_attention", ATTENTION: "full_attention"}
    fields = mamba_config(model, NAMES) | common_config(model)
    fields |= dict.fromkeys(MULTIPLIERS, 1.0)
    fields["layer_types"] = [kinds[mixer] for mixer in mixers]
    if ATTENTION in mixers:
        assert model.kv_channels is not None
        fields["attention_multiplier"] = model.kv_channels**-0.5
        if model.position_embedding_type == "rope":
            fields |= {"position_embedding_type": "rope", "rope_parameters": rope_config(model)}
    if MOE in model.hybrid_layer_pattern:
        return fields | {
            "num_local_experts": model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "intermediate_size": model.moe_ffn_hidden_size,
            "shared_intermediate_size": model.moe_shared_expert_intermediate_size,
            "router_aux_loss_coef": model.moe_aux_loss_coeff,
        }
    return fields | {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": model.ffn_hidden_size,
    }


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    count = fields["num_hidden_layers"]
    mixers = fields["layer_types"] or MAMBA * count
    if fields.given("num_hidden_layers") and count != len(mixers):
        fields.refuse("num_hidden_layers", f"must be {len(mixers)}, as the layers")
    experts = fields["num_local_experts"]
    values = common_model(fields, block_pattern(mixers, has_experts=experts != 0), NAMES)
    if ATTENTION in mixers:
        scale = values["kv_channels"] ** -0.5
        if fields["attention_multiplier"] != scale:
            fields.problems.append(
                f"attention_multiplier={fields['attention_multiplier']!r} must be {scale!r}: "
                "scores are divided by the root of a head's channels"
            )
        if fields["position_embedding_type"] == "rope":
            values |= rope_model(fields, partial=1.0)
            values["rotary_percent"] = 1.0  # transformers does not read it either
    if MAMBA in mixers:
        values |= mamba_model(fields, NAMES, values["hidden_size"])
    shared = fields["shared_intermediate_size"]
    if experts == 0:
        return values | {"ffn_hidden_size": shared}
    return values | {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": fields["intermediate_size"],
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_aux_loss_coeff": fields["router_aux_loss_coef"],
    }


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model. Gate and up are stacked on both sides."""
    mappings = common_table(model, ours, theirs, "model.norm.weight", "post_attention_layernorm")
    for number, (_, second) in enumerate(blocks(model)):
        (_, our), their = prefixes(number)
        if second == MLP:
            mappings += _gated_mlp(f"{our}mlp.", their, model, model.ffn_hidden_size)
            continue
        shared = model.moe_shared_expert_intermediate_size
        mappings += _gated_mlp(f"{our}mlp.shared_experts.", their, model, shared)
        mappings += _experts(f"{our}mlp.", f"{their}block_sparse_moe.", model, ours)
    return mappings


def _gated_mlp(our: str, their: str, model: ModelConfig, f: int | None) -> list[Mapping]:
    h = model.hidden_size
    assert f is not None
    theirs = f"{their}shared_mlp."
    return [
        renamed(f"{our}linear_fc1.weight", f"{theirs}input_linear.weight", (2 * f, h)),
        renamed(f"{our}linear_fc2.weight", f"{theirs}output_linear.weight", (h, f)),
    ]


def _experts(our: str, their: str, model: ModelConfig, ours: Names) -> list[Mapping]:
    h, f, count = model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts
    assert f is not None and count is not None
    mappings = [renamed(f"{our}router.weight", f"{their}router.layer.weight", (count, h))]
    for our_name, their_name, shape in (
        ("linear_fc1.weight", "input_linear.weight", (2 * f, h)),
        ("linear_fc2.weight", "output_linear.weight", (h, f)),
    ):
        single = [f"{our}experts.experts.{e}.{our_name}" for e in range(count)]
        stacked = f"{our}experts.experts.{our_name}"
        names = single if ours.has(single[0]) else stacked
        mappings.append(per_expert(names, f"{their}{their_name}", count, shape))
    return mappings


FAMILY = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    cannot_hold,
    config,
    FIELDS,
    model,
    table,
    GROUPED_NORM_SINCE,
)
