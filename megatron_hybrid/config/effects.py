"""What each field has to do with the function that a model computes, and where two of them differ.

A run trains, evaluates, generates and exports; ranks divide it in many ways. Most fields leave all
of these one function, up to rounding. This table names those that do not: `docs/numerics.md` says
more, and `differences` what a config's own are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.run import RunConfig

Effect = Literal["function", "rounding", "weights", "input", "record", "training", "differs"]

# Every field of a config, by its effect:
# function: part of what the model is, the same wherever it computes.
# rounding: how and where it is computed, and nothing of what.
# weights: how weights begin and move.
# input: which tokens come, and when.
# record: what is written, and when.
# training: noise, limits and losses of training alone: off in evaluation, generation and exports.
# differs: leaves training and inference, or two layouts, different functions; see `_DIFFERENCES`.
_FIELDS: Mapping[Effect, str] = {
    "function": """
        model.hybrid_layer_pattern model.hidden_size model.ffn_hidden_size model.activation
        model.num_attention_heads model.num_query_groups model.kv_channels model.window_size
        model.attn_mask_type
        model.position_embedding_type model.rotary_base model.rotary_percent
        model.mamba_version
        model.mamba_num_heads model.mamba_head_dim model.mamba_state_dim model.mamba_num_groups
        model.mamba_intermediate_size model.mamba_dt_rank
        model.mamba_inner_layernorms model.parallel_heads_join model.num_meta_tokens
        model.linear_num_key_heads model.linear_num_value_heads model.linear_key_head_dim
        model.linear_value_head_dim
        model.reuse_kv
        model.mamba_rms_norm model.key_multiplier model.ssm_multipliers model.ssm_in_multiplier
        model.ssm_out_multiplier model.attention_in_multiplier model.attention_out_multiplier
        model.mlp_multipliers model.embedding_multiplier model.lm_head_multiplier
        model.normalization model.layernorm_epsilon model.vocab_size
        model.untie_embeddings_and_output_weights model.add_bias_linear
        model.num_moe_experts model.moe_ffn_hidden_size model.moe_router_topk
        model.moe_shared_expert_intermediate_size model.moe_router_score_function
        model.moe_router_pre_softmax model.moe_router_topk_scaling_factor
        model.moe_router_enable_expert_bias model.moe_latent_size model.moe_router_num_groups
        model.moe_router_group_topk model.mtp_num_layers model.mtp_hybrid_override_pattern
        model.layers preset
    """,
    "rounding": """
        backend model.make_vocab_size_divisible_by model.moe_token_dispatcher_type
        parallel.tensor_model_parallel_size parallel.sequence_parallel
        parallel.pipeline_model_parallel_size parallel.virtual_pipeline_model_parallel_size
        parallel.context_parallel_size parallel.mamba_cp_comm_type
        parallel.expert_model_parallel_size
        parallel.expert_tensor_parallel_size parallel.use_distributed_optimizer
        parallel.overlap_grad_reduce parallel.overlap_param_gather
        gpu.cp_comm_type gpu.attention_backend gpu.overlap_p2p_comm gpu.align_param_gather
        gpu.gradient_accumulation_fusion gpu.apply_rope_fusion gpu.bias_activation_fusion
        gpu.bias_dropout_fusion gpu.cross_entropy_loss_fusion gpu.cross_entropy_fusion_impl
        gpu.moe_permute_fusion gpu.moe_shared_expert_overlap gpu.cuda_graph_impl
        gpu.cuda_graph_modules gpu.cuda_graph_warmup_steps
        training.micro_batch_size training.recompute_granularity training.recompute_method
        training.recompute_num_layers training.recompute_modules
    """,
    "weights": """
        model.init_method_std model.moe_router_bias_update_rate training.seed
        training.objective training.objective_options
        training.nonfinite_action training.loss_spike_factor training.loss_spike_action
        optimizer.lr optimizer.min_lr optimizer.lr_decay_style optimizer.lr_warmup_samples
        optimizer.lr_warmup_tokens optimizer.lr_warmup_fraction optimizer.lr_decay_samples
        optimizer.lr_decay_tokens optimizer.lr_wsd_decay_samples optimizer.lr_wsd_decay_tokens
        optimizer.lr_wsd_decay_style optimizer.restart_schedule optimizer.weight_decay
        optimizer.adam_beta1 optimizer.adam_beta2 optimizer.adam_eps optimizer.clip_grad
        upcycling.router_std upcycling.router_noise upcycling.reinit_fraction
        upcycling.scale_weights upcycling.from
        checkpoint.load checkpoint.finetune checkpoint.load_optim checkpoint.load_rng
    """,
    "input": """
        data.data_path data.sources data.phases data.max_epochs data.sample_order
        data.block_tokens data.split data.seq_length data.tokenizer_type data.tokenizer_model
        data.packed_documents data.data_cache_path data.mock_data data.num_workers
        training.global_batch_size training.batch_size_schedule training.train_iters
        training.train_samples training.train_tokens training.eval_iters
    """,
    "record": """
        run_dir training.eval_interval training.log_interval training.exit_interval
        training.exit_duration_in_mins training.hang_timeout_s training.profile
        training.profile_step_start training.profile_step_end training.profile_ranks
        training.callbacks training.eval_tasks training.eval_tasks_include_path
        training.eval_tasks_limit training.eval_tasks_num_fewshot
        checkpoint.save checkpoint.save_interval checkpoint.async_save checkpoint.keep_last
        checkpoint.verify_integrity
        logging.tensorboard logging.log_params_norm logging.float8_interval
        logging.expert_load_interval
        logging.wandb_project logging.wandb_entity logging.wandb_exp_name logging.wandb_save_dir
        logging.mlflow_experiment logging.mlflow_run_name logging.mlflow_tracking_uri
    """,
    "training": """
        model.hidden_dropout model.attention_dropout model.moe_expert_capacity_factor
        model.moe_aux_loss_coeff model.moe_z_loss_coeff model.moe_router_load_balancing_type
        model.mtp_loss_scaling_factor
    """,
    "differs": """
        precision.recipe precision.num_layers_at_start_in_bf16
        precision.num_layers_at_end_in_bf16 precision.fp8_param_gather precision.emulate
        gpu.moe_router_fusion
    """,
}
EFFECTS: Mapping[str, Effect] = {
    name: effect for effect, names in _FIELDS.items() for name in names.split()
}


@dataclass(frozen=True)
class Difference:
    """Where a field makes training and inference, or two layouts, different functions.

    Attributes:
        fields: all that have a part in it; the first one is shown with its value.
        applies: whether it does so in a resolved config.
        text: what differs, a sentence.
    """

    fields: tuple[str, ...]
    applies: Callable[[RunConfig], bool]
    text: str


_DIFFERENCES = (
    Difference(
        ("model.moe_expert_capacity_factor",),
        lambda c: c.model.moe_expert_capacity_factor is not None,
        "in training, full experts drop tokens, and which ones depends on what else is in the "
        "micro batch of a rank: other micro batches, TP or CP train another function. Evaluation, "
        "generation and exports drop none",
    ),
    Difference(
        (
            "precision.recipe", "precision.num_layers_at_start_in_bf16",
            "precision.num_layers_at_end_in_bf16", "precision.fp8_param_gather",
            "precision.emulate",
        ),
        lambda c: c.precision.recipe in FLOAT8_RECIPES,
        "training and its evaluations compute the products of linears in float8, scaled by what "
        "else is on a rank; generation and exports compute in bf16",
    ),
    Difference(
        ("gpu.moe_router_fusion",),
        lambda c: c.gpu.moe_router_fusion,
        "of experts with equal scores, as after upcycling, the fused router takes others than "
        "evaluation on another backend, generation and exports",
    ),
)  # fmt: skip


def differences(config: RunConfig) -> list[str]:
    """A sentence for each way in which training a config is another function than using it, or than
    training it in another layout."""
    found = []
    for difference in _DIFFERENCES:
        if difference.applies(config):
            section, _, name = difference.fields[0].partition(".")
            value = getattr(getattr(config, section), name)
            shown = str(value).lower() if isinstance(value, bool) else value
            found.append(f"{difference.fields[0]}={shown}: {difference.text}")
    return found


def differing_fields() -> set[str]:
    """The fields that some difference names."""
    return {name for difference in _DIFFERENCES for name in difference.fields}
