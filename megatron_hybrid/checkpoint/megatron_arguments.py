"""Megatron-LM's arguments, as its checkpoints hold them, as fields of our config."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.checkpoint.errors import CheckpointError

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
    "moe_router_enable_expert_bias",
)  # fmt: skip
# What changes the computation and has no field here, with the values that change nothing.
_MUST_BE = {
    "apply_layernorm_1p": (False, None),
    "qk_layernorm": (False, None),
    "add_qkv_bias": (False, None),
    "moe_latent_size": (None,),
    "moe_router_num_groups": (None, 1),
    "moe_shared_expert_gate": (False, None),
    "mtp_num_layers": (None, 0),
    "window_size": (None,),
    "multi_latent_attention": (False, None),
}


def run_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Sections and fields for `build_config`; only the model section says something.

    Args:
        arguments: the attributes of Megatron-LM's `args`.

    Raises:
        CheckpointError: an argument stands for something that has no field here.
    """
    problems = [
        f"{name}={arguments[name]!r} has no counterpart here; it must be {allowed[0]!r}"
        for name, allowed in _MUST_BE.items()
        if arguments.get(name) not in allowed
    ]
    pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        problems.append("neither hybrid_layer_pattern nor hybrid_override_pattern is set")
    if problems:
        text = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"the checkpoint's Megatron-LM arguments cannot be used:\n{text}")
    assert isinstance(pattern, str)
    names = _SAME_NAME + (_MOE_SAME_NAME if "E" in pattern else ())
    model = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if "E" in pattern:
        model["num_moe_experts"] = arguments.get("num_experts")
    if arguments.get("group_query_attention"):
        model["num_query_groups"] = arguments.get("num_query_groups")
    padded = arguments.get("padded_vocab_size")
    model |= {
        "hybrid_layer_pattern": pattern,
        "layernorm_epsilon": arguments.get("norm_epsilon", 1e-5),
        "activation": _activation(arguments),
        "vocab_size": arguments.get("vocab_size") or padded,
        # Megatron-LM pads to a multiple of this times TP; whatever it came to holds here.
        "make_vocab_size_divisible_by": padded,
    }
    return {
        "model": {name: value for name, value in model.items() if value is not None},
        "data": {"seq_length": arguments.get("seq_length") or 1},
        "training": {"train_iters": 1},
        "optimizer": {"lr": 1.0},
    }


def _activation(arguments: Mapping[str, Any]) -> str:
    if arguments.get("squared_relu"):
        return "squared_relu"
    return "swiglu" if arguments.get("swiglu") else "gelu"
