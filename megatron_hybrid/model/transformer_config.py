"""From a RunConfig to megatron-core's TransformerConfig."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu as engine_squared_relu
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.config.layer_entries import SIZES
from megatron_hybrid.config.layers import layers, rotates, sorts
from megatron_hybrid.config.pattern import ATTENTION, GDN, MOE, parse_pattern
from megatron_hybrid.config.precision import AMAX_HISTORY, FLOAT8_RECIPES
from megatron_hybrid.layers.multipliers import ScaledSilu
from megatron_hybrid.layers.vocabulary import draw_vocabulary
from megatron_hybrid.ops.squared_relu import squared_relu

# name -> (function, gated)
ACTIVATIONS: dict[str, tuple[Callable, bool]] = {
    "squared_relu": (squared_relu, False),
    "swiglu": (F.silu, True),
    "gelu": (F.gelu, False),
}
# Same field, same name, same meaning on both sides.
MODEL_FIELDS = (
    "hidden_size", "ffn_hidden_size", "num_query_groups", "kv_channels", "window_size",
    "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups",
    "normalization", "layernorm_epsilon", "init_method_std", "add_bias_linear",
    "hidden_dropout", "attention_dropout",
)  # fmt: skip
MOE_FIELDS = (
    "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk",
    "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_router_num_groups",
    "moe_router_group_topk", "moe_aux_loss_coeff", "moe_z_loss_coeff",
    "moe_router_load_balancing_type", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate", "moe_token_dispatcher_type", "moe_expert_capacity_factor",
)  # fmt: skip
GDN_FIELDS = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim",
)  # fmt: skip
PARALLEL_FIELDS = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size",
)  # fmt: skip
GPU_FIELDS = (
    "cp_comm_type", "overlap_p2p_comm", "gradient_accumulation_fusion", "apply_rope_fusion",
    "bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl", "moe_permute_fusion", "moe_router_fusion",
    "moe_shared_expert_overlap", "cuda_graph_impl", "cuda_graph_warmup_steps",
)  # fmt: skip
RECOMPUTE_FIELDS = ("recompute_granularity", "recompute_method", "recompute_num_layers")


def _float8_arguments(config: RunConfig) -> dict[str, Any]:
    """What the engine has Transformer Engine do in float8; the recipes' own options are its."""
    precision = config.precision
    recipe = FLOAT8_RECIPES.get(precision.recipe)
    if recipe is None:
        return {}
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    arguments: dict[str, Any] = {
        "fp8": recipe.engine_format,
        "fp8_recipe": recipe.engine_name,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }
    if recipe.scaling == "delayed":
        arguments |= {"fp8_amax_history_len": AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if parse_pattern(config.model.hybrid_layer_pattern).has(MOE):
        # Experts get any number of tokens, which the products in float8 do not take.
        arguments["moe_router_padding_for_quantization"] = True
    return arguments


def _gpu_arguments(config: RunConfig) -> dict[str, Any]:
    """The engine's choice of kernels and overlap, of which the torch backend has none."""
    gpu = config.gpu
    arguments: dict[str, Any] = {name: getattr(gpu, name) for name in GPU_FIELDS}
    return arguments | {
        "attention_backend": AttnBackend[gpu.attention_backend],
        "cuda_graph_modules": list(gpu.cuda_graph_modules),
    }


def transformer_config(config: RunConfig, backend: str, device: torch.device) -> TransformerConfig:
    """The engine's config of a resolved RunConfig; of unlike layers see `layer_configs`.

    Args:
        backend: "torch" or "transformer_engine", as `platform.resolve_backend` chose it.
        device: where parameters are made; "meta" makes none (for counting).
    """
    return _made(config, _common(config.model), backend, device)


def layer_configs(
    config: RunConfig, backend: str, device: torch.device
) -> dict[int, TransformerConfig]:
    """The engine's config of each layer by its number; arguments as of `transformer_config`."""
    common = _common(config.model)
    found: dict[int, TransformerConfig] = {}
    for sort in sorts(config.model):
        own = common.model_copy(update=sort.layer.sizes)
        found |= dict.fromkeys(sort.numbers, _made(config, own, backend, device))
    return found


def _common(model: ModelConfig) -> ModelConfig:
    """The model with the sizes of the first layer of each kind: what no layer has may not even be
    possible. Of attention it is the first with RoPE, whose angles are made for the whole model.
    """
    if not model.layers:
        return model
    own: dict[str, Any] = {}
    first_rotating = rotates(model)
    for layer in reversed(layers(model)):
        passed_over = first_rotating and layer.has(ATTENTION) and not layer.rotates
        own |= {
            name: size
            for name, size in layer.sizes.items()
            if not (passed_over and name in SIZES[ATTENTION])
        }
    return model.model_copy(update=own)


def _made(
    config: RunConfig, model: ModelConfig, backend: str, device: torch.device
) -> TransformerConfig:
    """The engine's config of a run whose layers have the sizes of `model`."""
    parallel = config.parallel
    pattern = parse_pattern(model.hybrid_layer_pattern)
    activation, gated = ACTIVATIONS[model.activation]
    if model.mlp_multipliers[0] != 1:
        activation = ScaledSilu(model.mlp_multipliers[0])
    dtype = torch.bfloat16 if config.precision.weights == "bf16" else torch.float32
    on_transformer_engine = backend == "transformer_engine"
    if on_transformer_engine and activation is squared_relu:
        activation = engine_squared_relu  # which its fused experts know
    arguments: dict[str, Any] = {name: getattr(model, name) for name in MODEL_FIELDS}
    if pattern.has(MOE):
        arguments |= {name: getattr(model, name) for name in MOE_FIELDS}
        # Routing decisions are made in fp32 whatever the precision of the rest.
        arguments |= {"moe_router_dtype": "fp32", "moe_grouped_gemm": on_transformer_engine}
    if pattern.has(GDN):
        arguments |= {name: getattr(model, name) for name in GDN_FIELDS}
    if model.key_multiplier != 1:
        # Of the products with the queries, which costs nothing, rather than of the keys.
        assert model.kv_channels is not None
        arguments["softmax_scale"] = model.key_multiplier * model.kv_channels**-0.5
    if model.mtp_num_layers is not None:
        arguments["mtp_num_layers"] = model.mtp_num_layers
    arguments |= {name: getattr(parallel, name) for name in PARALLEL_FIELDS}
    arguments |= {name: getattr(config.training, name) for name in RECOMPUTE_FIELDS}
    # Which count where the granularity is selective.
    arguments["recompute_modules"] = list(config.training.recompute_modules) or None
    if model.vocab_size is not None:
        arguments["embedding_init_method"] = draw_vocabulary(
            config.training.seed, "embedding", model.vocab_size, model.init_method_std
        )
    return TransformerConfig(
        **arguments,
        num_layers=pattern.num_layers,
        # The engine wants heads even of a pattern without attention.
        num_attention_heads=model.num_attention_heads or parallel.tensor_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        activation_func=activation,
        gated_linear_unit=gated,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **(_float8_arguments(config) if on_transformer_engine else {}),
        is_hybrid_model=True,
        # The mean over the tokens of the global batch, however they fall on ranks and micro
        # batches: packed documents mask some, and ranks would not have the same number.
        calculate_per_token_loss=True,
        # gloo matches messages in order: batched sends of both directions between the same two
        # ranks, as interleaving with two stages has them, would be swapped in silence.
        # Overlapped messages are sent one by one.
        batch_p2p_comm=device.type == "cuda" and not config.gpu.overlap_p2p_comm,
        use_cpu_initialization=device.type == "meta",
        perform_initialization=device.type != "meta",
        **(_gpu_arguments(config) if on_transformer_engine else {}),
        transformer_impl="transformer_engine" if on_transformer_engine else "local",
    )
