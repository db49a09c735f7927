"""Megatron-LM's arguments, as its checkpoints hold them, as fields of our config."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.saved_config import FUNCTION_FIELDS, SHAPE_FIELDS
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.layers import MULTIPLIED

_SAME_NAME = (
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups",
    "normalization", "init_method_std", "untie_embeddings_and_output_weights", "add_bias_linear",
    "hidden_dropout", "attention_dropout", "position_embedding_type", "rotary_base",
    "rotary_percent",
)  # fmt: skip
_MOE_SAME_NAME = (
    "moe_ffn_hidden_size", "moe_router_topk", "moe_shared_expert_intermediate_size",
    "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_latent_size", "moe_router_num_groups",
    "moe_router_group_topk",
)  # fmt: skip
_EPSILON = ("layernorm_epsilon", "norm_epsilon")  # newer and older releases
# What changes the computation and has no field here, with the values that change nothing. Releases
# know some of them only: an argument that is missing, or null, changes nothing either.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    # Norms.
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    # Attention.
    "add_qkv_bias": (False,),
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (),
    "linear_attention_freq": (),
    # Positions.
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (1,),
    "use_rope_scaling": (False,),
    "rope_type": ("rope",),
    "no_rope_freq": (),
    "mrope_section": (),
    # MLPs and experts.
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0,),
    "activation_func_clamp_value": (),
    "moe_shared_expert_gate": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_mlp_glu_interleave_size": (),
    "moe_shared_expert_glu_interleave_size": (),
    # The whole model.
    "use_mup": (False,),
    "mtp_num_layers": (0,),
}
# It has no factors but those of MuP, which are refused: fields, and the layers that they are of.
_MULTIPLIED: dict[str, str | None] = {
    **MULTIPLIED, "embedding_multiplier": None, "lm_head_multiplier": None,
    "num_meta_tokens": None,
}  # fmt: skip
# Of the arguments that describe a model, those that leave it what it is; * stands for any letters.
WITHOUT_EFFECT = (
    # Which layers there are, the pattern says; how they lie on ranks changes nothing.
    "num_layers", "is_hybrid_model", "moe_layer_freq", "mtp_*", "pipeline_model_parallel_layout",
    "account_for_*",
    # Of what `_MUST_BE` refuses.
    "dsa_*", "linear_*", "mup_*", "window_attn_skip_freq", "rope_scaling_factor",
    "rotary_scaling_factor",
    # Only how it was trained: initial weights, noise, losses, balance.
    "embedding_init_method_std", "init_model_with_meta_device", "qk_clip*",
    "log_max_attention_logit", "calculate_per_token_loss", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_load_balancing_type", "moe_router_bias_update_rate",
    "moe_router_quantile_balancing_ema", "moe_router_force_*", "moe_input_jitter_eps",
    "moe_expert_capacity_factor", "moe_expert_rank_capacity_factor", "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity", "moe_enable_routing_replay", "moe_per_layer_logging",
    # How and in which precision it is computed.
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "fp32_residual_connection",
    "disable_bf16_reduced_precision_matmul", "first_last_layers_bf16", "num_layers_at_*", "fp8*",
    "fp4*", "mamba_training_ssm_states_dtype", "moe_router_dtype", "batch_invariant_mode",
    "attention_backend", "flash_*", "transformer_impl", "use_kitchen_attention",
    "kitchen_attention_backend", "use_mamba_mem_eff_path", "use_te_activation_func",
    "use_transformer_engine_op_fuser", "use_fused_weighted_squared_relu", "use_grouped_gemm_*",
    "apply_rope_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "fused_residual_rmsnorm",
    "moe_*_fusion", "moe_permute_fusion_into_hybridep", "moe_grouped_gemm", "moe_single_grouped_*",
    "moe_router_padding_*", "moe_token_dispatcher_type", "moe_flex_*", "moe_enable_deepep",
    "moe_deepep_*", "moe_hybridep_*", "moe_ncclep_*", "moe_pad*", "moe_paged_*",
    "moe_layer_recompute", "moe_shared_expert_overlap", "recompute_*",
    "distribute_saved_activations",
    "*offload*", "cp_comm_type", "*cuda_graph*", "mlp_chunks_*", "inference_*",
    "nccl_all_reduce_for_prefill", "symmetric_ar_type", "clone_scatter_output_in_embedding",
    "high_priority_a2a_comm_stream", "config_logger_dir", "test_mode",
)  # fmt: skip


def run_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and fields for `build_config`; only the model section says something.

    Args:
        arguments: the attributes of Megatron-LM's `args`.

    Raises:
        CheckpointError: an argument stands for something that has no field here.
    """
    problems = _without_counterpart(arguments)
    epsilons = {name: arguments[name] for name in _EPSILON if arguments.get(name) is not None}
    if len(set(epsilons.values())) > 1:
        problems.append(" and ".join(f"{n}={value!r}" for n, value in epsilons.items()) + " differ")
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        problems.append("neither hybrid_layer_pattern nor hybrid_override_pattern is set")
    seq_length = arguments.get("seq_length") or arguments.get("encoder_seq_length")
    if seq_length is None:
        problems.append("neither seq_length nor encoder_seq_length is set")
    if problems:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"the checkpoint's Megatron-LM arguments cannot be used:\n{text}")
    assert isinstance(pattern, str)
    names = _SAME_NAME + (_MOE_SAME_NAME if "E" in pattern else ())
    model = {name: arguments[name] for name in names if arguments.get(name) is not None}
    model = _without_idle_groups(model)
    if "E" in pattern:
        model["num_moe_experts"] = arguments.get("num_experts")
    if arguments.get("group_query_attention"):
        model["num_query_groups"] = arguments.get("num_query_groups")
    padded = arguments.get("padded_vocab_size")
    model |= {
        "hybrid_layer_pattern": pattern,
        "layernorm_epsilon": next(iter(epsilons.values()), 1e-5),
        "activation": _activation(arguments),
        "vocab_size": arguments.get("vocab_size") or padded,
        # Megatron-LM pads to a multiple of this times TP; whatever it came to holds here.
        "make_vocab_size_divisible_by": padded,
    }
    return {
        "model": {name: value for name, value in model.items() if value is not None},
        "data": {"seq_length": seq_length},
        "training": {"train_iters": 1},
        "optimizer": {"lr": 1.0},
    }


def differences(arguments: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """What Megatron-LM's arguments say of a model's tensors and layers that is not so of this one.

    Arguments that are missing say nothing.
    """
    layers = model.hybrid_layer_pattern.replace("|", "")
    names = [
        name
        for name in (*_SAME_NAME, *_MOE_SAME_NAME)
        if name in SHAPE_FIELDS and set(_layers_of(name)) & set(layers)
    ]
    said = {name: arguments[name] for name in names if arguments.get(name) is not None}
    activations = any(name in arguments for name in ("squared_relu", "swiglu"))
    if activations and set(layers) & set("-E"):
        said["activation"] = _activation(arguments)
    if arguments.get("group_query_attention") and "*" in layers:
        said["num_query_groups"] = arguments.get("num_query_groups")
    found = [
        f"model.{name}={shown(getattr(model, name))}, in the checkpoint {shown(value)}"
        for name, value in said.items()
        if getattr(model, name) not in (value, None)
    ]
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern.replace("|", "") != layers:
        found.append(f"model.hybrid_layer_pattern={layers!r}, in the checkpoint {pattern!r}")
    return found + _without_counterpart(arguments)


def function_values(arguments: Mapping[str, Any], layers: str) -> dict[str, Any]:
    """Fields of our model section that leave its tensors what they are, as the arguments say them.

    Args:
        layers: symbols of the model's layers; of other kinds nothing is said.
    """
    names = [name for name in FUNCTION_FIELDS if name in (*_SAME_NAME, *_MOE_SAME_NAME)]
    found = _without_idle_groups({
        name: arguments[name]
        for name in names
        if arguments.get(name) is not None and set(_layers_of(name)) & set(layers)
    })  # fmt: skip
    epsilons = [arguments[name] for name in _EPSILON if arguments.get(name) is not None]
    # Megatron-LM trains such models with no other mask, and has no argument for it.
    mask = {"attn_mask_type": "causal"} if "*" in layers else {}
    usual = {
        name: ModelConfig.model_fields[name].default
        for name, kind in _MULTIPLIED.items()
        if name in FUNCTION_FIELDS and (kind is None or kind in layers)
    }
    return found | mask | usual | ({"layernorm_epsilon": epsilons[0]} if epsilons else {})


def _layers_of(name: str) -> str:
    """The kinds of layers that an argument says something of; all, where it is the model's."""
    if name.startswith("mamba_"):
        return "M"
    if name.startswith("moe_"):
        return "E"
    kinds = {"num_attention_heads": "*", "kv_channels": "*", "ffn_hidden_size": "-"}
    return kinds.get(name, "M*-E")


def _without_counterpart(arguments: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={arguments[name]!r} has no counterpart here; it must be {(*allowed, None)[0]!r}"
        for name, allowed in _MUST_BE.items()
        if arguments.get(name) not in (*allowed, None)
    ]


def _without_idle_groups(model: dict[str, Any]) -> dict[str, Any]:
    """Without groups of experts of which a token goes to any: Megatron-LM reads none of them."""
    idle = "" if model.get("moe_router_group_topk") else "moe_router_num_groups"
    return {name: value for name, value in model.items() if name != idle}


def _activation(arguments: Mapping[str, Any]) -> str:
    if arguments.get("squared_relu"):
        return "squared_relu"
    return "swiglu" if arguments.get("swiglu") else "gelu"
