"""Nemotron-H (`nemotron_h`): Nemotron-H, Nemotron Nano v2, Nemotron 3 Nano; dense and MoE.

Its config.json beside our model section, and its table of tensors.
"""

from typing import Any

from checkpoints_converter import layers
from checkpoints_converter.family import Family
from checkpoints_converter.fields import Fields
from checkpoints_converter.mamba_fields import (
    GATED_NORM_EPSILON,
    note_residual,
    refuse_other_epsilon,
)
from checkpoints_converter.nemotron_h_fields import ACTIVATIONS, FIELDS
from checkpoints_converter.weights import Mapping, Names, always_zero, renamed
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE, parse_pattern
from megatron_hybrid.model.counts import CONV_KERNEL

# transformers clamps the step size from below, and fails at 0; here nothing is clamped.
NO_TIME_STEP_MIN = 1e-30
# Experts by which a group is judged.
_BEST_OF_GROUP = 2
_TYPE_OF = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp", MOE: "moe"}


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' nemotron_h cannot compute what a model of ours computes."""
    kinds = parse_pattern(model.hybrid_layer_pattern)
    allowed: dict[str, tuple[Any, str]] = {}
    if kinds.has(MAMBA):
        allowed["layernorm_epsilon"] = (GATED_NORM_EPSILON, "the gated norm has the same epsilon")
    if kinds.has(ATTENTION):
        allowed["position_embedding_type"] = ("none", "its attention has no positions")
        allowed["attn_mask_type"] = ("causal", "its attention is causal")
        allowed["window_size"] = (None, "its attention has no window")
    if kinds.has(MOE):
        allowed["moe_router_score_function"] = ("sigmoid", "its router has no softmax")
    if kinds.has(MLP) or kinds.has(MOE) or kinds.has(ATTENTION):
        allowed["add_bias_linear"] = (False, "its attention has no biases")
    problems = [
        f"model.{name}={getattr(model, name)!r} must be {value!r}: {why}"
        for name, (value, why) in allowed.items()
        if getattr(model, name) != value
    ]
    if (kinds.has(MLP) or kinds.has(MOE)) and model.activation not in ACTIVATIONS.values():
        choices = " or ".join(ACTIVATIONS.values())
        problems.append(
            f"model.activation={model.activation} must be {choices}: its MLPs have no gate"
        )
    if kinds.has(MOE) and model.moe_shared_expert_intermediate_size is None:
        problems.append(
            "model.moe_shared_expert_intermediate_size=null must be a size: "
            "its MoE layers always have a shared expert"
        )
    if kinds.has(MOE) and _groups(model) > 1:
        assert model.moe_router_group_topk is not None
        best = model.moe_router_topk // model.moe_router_group_topk
        if best != _BEST_OF_GROUP:
            problems.append(
                f"model.moe_router_group_topk={model.moe_router_group_topk} with "
                f"model.moe_router_topk={model.moe_router_topk} judges groups of experts by their "
                f"{best} best, and transformers by {_BEST_OF_GROUP}"
            )
    return problems


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    pattern = parse_pattern(model.hybrid_layer_pattern)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": pattern.num_layers,
        "hybrid_override_pattern": pattern.layers,
        "layers_block_type": [_TYPE_OF[symbol] for symbol in pattern.layers],
        "intermediate_size": model.ffn_hidden_size,
        # Without an MLP or expert it says nothing, and any name will do.
        "mlp_hidden_act": names.get(model.activation, "relu2"),
        "mlp_bias": False,
        "layer_norm_epsilon": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "hidden_dropout": model.hidden_dropout,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        # transformers ties nothing, so that the file holds two alike; that they are one is said.
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_bias": False,
    }
    if pattern.has(ATTENTION):
        fields |= {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_query_groups,
            "head_dim": model.kv_channels,
            "attention_bias": False,
            "attention_dropout": model.attention_dropout,
            "sliding_window": None,
        }
    if pattern.has(MAMBA):
        assert model.mamba_num_heads is not None
        width = model.mamba_num_heads * model.mamba_head_dim
        fields |= {
            "ssm_state_size": model.mamba_state_dim,
            "mamba_num_heads": model.mamba_num_heads,
            "mamba_head_dim": model.mamba_head_dim,
            "n_groups": model.mamba_num_groups,
            "conv_kernel": CONV_KERNEL,
            "expand": max(1, round(width / model.hidden_size)),
            "mamba_hidden_act": "silu",
            "use_conv_bias": True,
            "mamba_proj_bias": False,
            "chunk_size": 128,
            "time_step_min": NO_TIME_STEP_MIN,
            "time_step_max": 0.1,
            "time_step_floor": 1e-4,
        }
    if pattern.has(MOE):
        groups = _groups(model)
        if model.moe_latent_size is not None:
            fields["moe_latent_size"] = model.moe_latent_size
        fields |= {
            "n_routed_experts": model.num_moe_experts,
            "n_shared_experts": 1,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "num_experts_per_tok": model.moe_router_topk,
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            # megatron-core divides by the sum where there is something to sum.
            "norm_topk_prob": model.moe_router_topk > 1,
            "n_group": groups,
            "topk_group": model.moe_router_group_topk if groups > 1 else 1,
        }
    return fields


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json."""
    pattern = fields["layers_block_type"]
    if fields["num_hidden_layers"] not in (None, len(pattern)):
        fields.refuse("num_hidden_layers", f"must be {len(pattern)}, as the layers")
    note_residual(fields)
    if fields["num_nextn_predict_layers"]:
        fields.notes.append(
            f"num_nextn_predict_layers={fields['num_nextn_predict_layers']}: the tensors of "
            "multi-token prediction (mtp.*) are left out, as transformers leaves them"
        )
    values: dict[str, Any] = {
        "hybrid_layer_pattern": pattern,
        "hidden_size": fields["hidden_size"],
        "vocab_size": fields["vocab_size"],
        "layernorm_epsilon": fields["layer_norm_epsilon"],
        "init_method_std": fields["initializer_range"],
        "hidden_dropout": fields["hidden_dropout"],
        "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
        "position_embedding_type": "none",
    }
    if ATTENTION in pattern:
        heads = fields["num_attention_heads"]
        values |= {
            "num_attention_heads": heads,
            "num_query_groups": fields["num_key_value_heads"] or heads,
            "kv_channels": fields["head_dim"],
            "attention_dropout": fields["attention_dropout"],
        }
    if MLP in pattern:
        values["ffn_hidden_size"] = fields["intermediate_size"]
    if MLP in pattern or MOE in pattern:
        values["activation"] = fields["mlp_hidden_act"]
    if MAMBA in pattern:
        values |= _mamba_model(fields)
    if MOE in pattern:
        values |= _moe_model(fields)
    return values


def _mamba_model(fields: Fields) -> dict[str, Any]:
    refuse_other_epsilon(fields, "layer_norm_epsilon")
    shortest = fields["time_step_min"]
    if shortest > NO_TIME_STEP_MIN:
        fields.notes.append(
            f"time_step_min={shortest:g} only draws initial weights here; transformers from 5.15.1 "
            "also raises shorter steps to it, except while decoding"
        )
    return {
        "mamba_num_heads": fields["mamba_num_heads"],
        "mamba_head_dim": fields["mamba_head_dim"],
        "mamba_state_dim": fields["ssm_state_size"],
        "mamba_num_groups": fields["n_groups"],
    }


def _moe_model(fields: Fields) -> dict[str, Any]:
    topk, normed = fields["num_experts_per_tok"], fields["norm_topk_prob"]
    if normed != (topk > 1):
        fields.refuse(
            "norm_topk_prob",
            f"must be {topk > 1}: with num_experts_per_tok={topk}, megatron-core "
            + ("divides the scores by their sum" if topk > 1 else "leaves the only score as it is"),
        )
    experts, groups, open_groups = (
        fields[name] for name in ("n_routed_experts", "n_group", "topk_group")
    )
    limited = open_groups != groups
    if limited:
        _refuse_other_groups(fields, experts, groups, open_groups, topk)
    factor = fields["routed_scaling_factor"]
    return {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": fields["moe_shared_expert_intermediate_size"],
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
        "moe_latent_size": fields["moe_latent_size"],
        **(
            {"moe_router_num_groups": groups, "moe_router_group_topk": open_groups}
            if limited
            else {}
        ),
    }


def _refuse_other_groups(
    fields: Fields, experts: int, groups: int, open_groups: int, topk: int
) -> None:
    """Of groups of experts, what transformers and megatron-core do not read alike."""
    if experts % groups:
        fields.refuse("n_group", f"must divide n_routed_experts={experts}")
    elif open_groups > groups:
        fields.refuse("topk_group", f"must be at most n_group={groups}")
    elif topk // open_groups != _BEST_OF_GROUP:
        fields.refuse(
            "topk_group",
            f"with num_experts_per_tok={topk}, transformers goes by the {_BEST_OF_GROUP} best "
            f"experts of each group, and megatron-core by {topk // open_groups}",
        )


def _groups(model: ModelConfig) -> int:
    """Groups of experts; 1 where all are open."""
    groups = model.moe_router_num_groups
    return 1 if groups is None or groups == model.moe_router_group_topk else groups


def table(model: ModelConfig, ours: Names, theirs: Names) -> list[Mapping]:
    """Every tensor of a model.

    Args:
        ours, theirs: names that are there, for those that go by several: norms are saved under
            others without Transformer Engine, and transformers' releases differ in prefixes.
    """
    final_norm = theirs.pick("backbone.norm_f.weight", "model.norm_f.weight")
    root = final_norm.partition(".")[0]
    embedding = theirs.pick(f"{root}.embeddings.weight", f"{root}.embedding.weight")
    mappings = layers.vocabulary(model, embedding, "lm_head.weight", theirs, held_once=False)
    mappings.append(renamed("decoder.final_norm.weight", final_norm, (model.hidden_size,)))
    for number, kind in enumerate(parse_pattern(model.hybrid_layer_pattern).layers):
        our, their = f"decoder.layers.{number}.", f"{root}.layers.{number}."
        mappings.append(layers.norm(model, kind, our, f"{their}norm.weight", ours))
        mixer = f"{their}mixer."
        if kind == MAMBA:
            mappings += layers.mamba(model, our, mixer)
        elif kind == ATTENTION:
            mappings += layers.attention(model, our, mixer)
        elif kind == MLP:
            mappings += layers.mlp(f"{our}mlp.", mixer, model.hidden_size, model.ffn_hidden_size)
        else:
            mappings += _moe(model, our, mixer, ours, theirs)
    return mappings


def _moe(model: ModelConfig, our: str, their: str, ours: Names, theirs: Names) -> list[Mapping]:
    """Router, experts and shared expert, none of them with a gate."""
    h, experts = model.hidden_size, model.num_moe_experts
    assert experts is not None
    bias = f"{their}gate.e_score_correction_bias"
    return [
        renamed(f"{our}mlp.router.weight", f"{their}gate.weight", (experts, h)),
        renamed(f"{our}mlp.router.expert_bias", bias, (experts,), fp32=True)
        if model.moe_router_enable_expert_bias
        else always_zero(bias, (experts,), fp32=True),
        *layers.experts(model, our, f"{their}experts.", ours, theirs),
        *_latent(model, our, their),
        *layers.mlp(
            f"{our}mlp.shared_experts.",
            f"{their}shared_experts.",
            h,
            model.moe_shared_expert_intermediate_size,
        ),
    ]


def _latent(model: ModelConfig, our: str, their: str) -> list[Mapping]:
    """What tokens are projected with before their experts and after them: [l, h] and [h, l]."""
    h, latent = model.hidden_size, model.moe_latent_size
    if latent is None:
        return []
    return [
        renamed(f"{our}mlp.{name}.weight", f"{their}{name}.weight", shape)
        for name, shape in (("fc1_latent_proj", (latent, h)), ("fc2_latent_proj", (h, latent)))
    ]


FAMILY = Family(
    "nemotron_h", "NemotronHForCausalLM", cannot_hold, config, FIELDS, model, table,
    left_out=("mtp.",),
)  # fmt: skip
