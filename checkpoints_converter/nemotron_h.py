"""Nemotron-H (`nemotron_h`): Nemotron-H, Nemotron Nano v2, Nemotron 3 Nano; dense and MoE.

Its config.json beside our model section, and its table of tensors.
"""

import math
from typing import Any

from checkpoints_converter import layers
from checkpoints_converter.family import Family, Fields
from checkpoints_converter.weights import Mapping, Names, always_zero, renamed
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE, parse_pattern
from megatron_hybrid.model.counts import CONV_KERNEL

GATED_NORM_EPSILON = 1e-5  # fixed in megatron-core's mixer and in ours
# transformers clamps the step size from below, and fails at 0; here nothing is clamped.
NO_TIME_STEP_MIN = 1e-30
_LAYER_TYPES = {"linear_attention": MAMBA, "mamba": MAMBA, "full_attention": ATTENTION,
                "attention": ATTENTION, "mlp": MLP, "moe": MOE}  # fmt: skip
_TYPE_OF = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp", MOE: "moe"}
_ACTIVATIONS = {"relu2": "squared_relu", "gelu": "gelu"}


def cannot_hold(model: ModelConfig) -> list[str]:
    """Why transformers' nemotron_h cannot compute what a model of ours computes."""
    kinds = parse_pattern(model.hybrid_layer_pattern)
    allowed: dict[str, tuple[Any, str]] = {}
    if kinds.has(MAMBA):
        allowed["layernorm_epsilon"] = (GATED_NORM_EPSILON, "the gated norm has the same epsilon")
    if kinds.has(ATTENTION):
        allowed["position_embedding_type"] = ("none", "its attention has no positions")
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
    if (kinds.has(MLP) or kinds.has(MOE)) and model.activation not in _ACTIVATIONS.values():
        choices = " or ".join(_ACTIVATIONS.values())
        problems.append(
            f"model.activation={model.activation} must be {choices}: its MLPs have no gate"
        )
    if kinds.has(MOE) and model.moe_shared_expert_intermediate_size is None:
        problems.append(
            "model.moe_shared_expert_intermediate_size=null must be a size: "
            "its MoE layers always have a shared expert"
        )
    return problems


def config(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what a model computes."""
    pattern = parse_pattern(model.hybrid_layer_pattern)
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
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
        "tie_word_embeddings": False,
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
        fields |= {
            "n_routed_experts": model.num_moe_experts,
            "n_shared_experts": 1,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "num_experts_per_tok": model.moe_router_topk,
            "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
            # megatron-core divides by the sum where there is something to sum.
            "norm_topk_prob": model.moe_router_topk > 1,
            "n_group": 1,
            "topk_group": 1,
        }
    return fields


def model(fields: Fields) -> dict[str, Any]:
    """Our model section of a config.json; defaults are those of transformers' NemotronHConfig."""
    pattern = _pattern(fields)
    activation = fields.must_be(
        "mlp_hidden_act", *_ACTIVATIONS, default="relu2", why="there is no such MLP here"
    )
    fields.must_be("mlp_bias", False, default=False, why="biases of MLP layers alone")
    fields.must_be("use_bias", False, default=False, why="Mamba projections have no biases here")
    fields.must_be("num_nextn_predict_layers", 0, default=0, why="no multi-token prediction here")
    values: dict[str, Any] = {
        "hybrid_layer_pattern": pattern,
        "hidden_size": fields.size("hidden_size", 4096),
        "ffn_hidden_size": fields.size("intermediate_size", 21504),
        "vocab_size": fields.size("vocab_size", 131072),
        "activation": _ACTIVATIONS.get(str(activation), "squared_relu"),
        "layernorm_epsilon": fields.get("layer_norm_epsilon", 1e-5),
        "init_method_std": fields.get("initializer_range", 0.02),
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "none",
    }
    if ATTENTION in pattern:
        heads = fields.size("num_attention_heads", 32)
        groups = heads if fields.values.get("num_key_value_heads", 8) is None else None
        values |= {
            "num_attention_heads": heads,
            "num_query_groups": groups or fields.size("num_key_value_heads", 8),
            "kv_channels": fields.size("head_dim", 128),
            "attention_dropout": fields.number("attention_dropout", 0.0),
        }
    if MAMBA in pattern:
        values |= _mamba_model(fields)
    if MOE in pattern:
        values |= _moe_model(fields)
    return values


def _pattern(fields: Fields) -> str:
    """The layer pattern, said in one of two ways, or in both alike."""
    text, types = fields.get("hybrid_override_pattern"), fields.get("layers_block_type")
    types = types if types is not None else fields.get("layer_types")
    if types is not None and not isinstance(types, list):
        fields.problems.append(f"layers_block_type={types!r} must be a list of kinds of layers")
        return MAMBA
    if types is not None:
        unknown = sorted({str(name) for name in types} - _LAYER_TYPES.keys())
        if unknown:
            fields.problems.append(
                f"layers_block_type has {', '.join(unknown)}; allowed: {', '.join(_LAYER_TYPES)}"
            )
            return MAMBA
        listed = "".join(_LAYER_TYPES[name] for name in types)
        if text is not None and text != listed:
            fields.problems.append(
                f"hybrid_override_pattern={text!r} and layers_block_type ({listed!r}) differ"
            )
        text = listed
    if not isinstance(text, str):
        fields.problems.append("neither hybrid_override_pattern nor layers_block_type is given")
        return MAMBA
    layers = fields.get("num_hidden_layers", len(text))
    if layers != len(text):
        fields.problems.append(f"num_hidden_layers={layers!r} must be {len(text)}, as the layers")
    return text


def _mamba_model(fields: Fields) -> dict[str, Any]:
    fields.must_be(
        "layer_norm_epsilon", GATED_NORM_EPSILON, default=1e-5,
        why="megatron-core's gated norm has no other epsilon",
    )  # fmt: skip
    fields.must_be("conv_kernel", CONV_KERNEL, default=4, why="the convolution's length is fixed")
    fields.must_be("use_conv_bias", True, default=True, why="the convolution always has a bias")
    fields.must_be("mamba_hidden_act", "silu", "swish", default="silu", why="the gate is a silu")
    limit = fields.get("time_step_limit", [0.0, math.inf])
    try:
        low, high = _time_step_limit(limit)
    except (TypeError, ValueError, KeyError, AttributeError):
        low, high = math.nan, math.nan
    if not (low <= 0 and high == math.inf):
        fields.problems.append(
            f"time_step_limit={limit!r} must be [0, inf]: step sizes are not clamped here"
        )
    shortest = fields.number("time_step_min", 0.001)
    if shortest > NO_TIME_STEP_MIN:
        fields.notes.append(
            f"time_step_min={shortest:g} only draws initial weights here; transformers from 5.15.1 "
            "also raises shorter steps to it, except while decoding"
        )
    return {
        "mamba_num_heads": fields.size("mamba_num_heads", 128),
        "mamba_head_dim": fields.size("mamba_head_dim", 64),
        "mamba_state_dim": fields.size("ssm_state_size", 128),
        "mamba_num_groups": fields.size("n_groups", 8),
    }


def _time_step_limit(value: Any) -> tuple[float, float]:
    """Two numbers; transformers writes infinity as `{"__float__": "Infinity"}`."""
    low, high = (
        float(part["__float__"].replace("Infinity", "inf")) if isinstance(part, dict) else part
        for part in value
    )
    return float(low), float(high)


def _moe_model(fields: Fields) -> dict[str, Any]:
    topk = fields.size("num_experts_per_tok", 2)
    fields.must_be(
        "norm_topk_prob", topk > 1, default=True,
        why=f"with num_experts_per_tok={topk}, megatron-core "
        + ("divides the scores by their sum" if topk > 1 else "leaves the only score as it is"),
    )  # fmt: skip
    groups = fields.size("n_group", 1)
    fields.must_be("topk_group", groups, default=1, why=f"all n_group={groups} groups are open")
    fields.must_be("moe_latent_size", None, why="there are no latent experts here")
    factor = fields.number("routed_scaling_factor", 1.0)
    return {
        "num_moe_experts": fields.size("n_routed_experts", 8),
        "moe_ffn_hidden_size": fields.size("moe_intermediate_size", 7688),
        "moe_shared_expert_intermediate_size": fields.size(
            "moe_shared_expert_intermediate_size", 7688
        ),
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
    }


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
        *layers.mlp(
            f"{our}mlp.shared_experts.",
            f"{their}shared_experts.",
            h,
            model.moe_shared_expert_intermediate_size,
        ),
    ]


FAMILY = Family("nemotron_h", "NemotronHForCausalLM", cannot_hold, config, model, table)
