"""Settings of no effect are said, each with its reason, and only then."""

import pytest

from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.config.describe import fields
from megatron_hybrid.config.notes import notes
from megatron_hybrid.config.unused import UNUSED_FIELDS
from tests.config import GOOD

# What is typed, and what gives it an effect.
UNUSED = {
    "training.eval_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "logging.expert_load_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "logging.float8_interval=11": (
        ["training.train_iters=10", "precision.emulate=true"], "training.train_iters=11",
    ),
    "training.exit_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "training.log_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "training.eval_iters=3": (["training.eval_interval=null"], "training.eval_interval=2"),
    "training.loss_spike_action=skip": ([], "training.loss_spike_factor=2"),
    "training.profile_step_start=3": ([], "training.profile=true"),
    "training.profile_step_end=30": ([], "training.profile=true"),
    "training.profile_ranks=[0, 1]": ([], "training.profile=true"),
    "training.recompute_granularity=selective": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.position_embedding_type=rope": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.attention_dropout=0.1": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.rotary_base=5": ([], "model.position_embedding_type=rope"),
    "model.rotary_percent=0.5": ([], "model.position_embedding_type=rope"),
    "gpu.apply_rope_fusion=true": ([], "model.position_embedding_type=rope"),
    "gpu.cuda_graph_warmup_steps=5": ([], "gpu.cuda_graph_impl=local"),
    "optimizer.lr_wsd_decay_style=linear": ([], "optimizer.lr_decay_style=WSD"),
    "optimizer.min_lr=1e-5": (
        ["optimizer.lr_decay_style=constant"], "optimizer.lr_decay_style=linear",
    ),
    "data.data_cache_path=x": (["data.mock_data=false"], "data.sample_order=megatron"),
    "data.max_epochs=1": ([], "data.mock_data=false"),
    "data.block_tokens=8192": ([], "data.mock_data=false"),
    "data.sample_order=megatron": ([], "data.mock_data=false"),
    "data.packed_documents=true": (
        ["model.hybrid_layer_pattern=-E"], "model.hybrid_layer_pattern=ME",
    ),
    "data.split=8,1,1": ([], "data.mock_data=false"),
    "data.split=7,2,1": (
        ["data.mock_data=false", "data.sources={web: {path: x, split: '1,1,1'}}",
         "data.phases=[{name: all, weights: {web: 1}}]"],
        "data.sources={web: {path: x}}",
    ),
    "data.max_epochs=2": (
        ["data.mock_data=false", "data.sources={web: {path: x, max_epochs: 1}}"],
        "data.sources={web: {path: x}}",
    ),
    "data.seq_length=64": (
        ["training.eval_interval=null",
         "data.phases=[{name: all, seq_length: 32, weights: {web: 1}}]"],
        "training.eval_interval=2",
    ),
    "checkpoint.save_interval=11": (["training.train_iters=10"], "training.train_iters=11"),
    "checkpoint.load_optim=false": (["checkpoint.finetune=true"], "checkpoint.finetune=false"),
    "checkpoint.load_optim= false": (["optimizer.restart_schedule=true"],
                                 "optimizer.restart_schedule=false"),
    "checkpoint.load_rng=false": (["upcycling.from=x"], "upcycling.from=null"),
    "optimizer.restart_schedule=true": (
        ["checkpoint.finetune=true"], "checkpoint.finetune=false",
    ),
    "optimizer.lr_decay_tokens=9": (
        ["optimizer.lr_decay_style=constant", "optimizer.lr_warmup_fraction=0"],
        "optimizer.lr_decay_style=linear",
    ),
    "optimizer.lr_decay_samples=9": (
        ["optimizer.lr_decay_style=constant", "optimizer.lr_warmup_fraction=0"],
        "optimizer.lr_warmup_fraction=0.1",
    ),
    "model.num_attention_heads=8": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.num_query_groups=1": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.kv_channels=16": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.mamba_version=1": (
        ["model.hybrid_layer_pattern=*-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.mamba_intermediate_size=96": ([], "model.layers.1.mamba_version=1"),
    "model.linear_num_key_heads=2": ([], "model.hybrid_layer_pattern=MG"),
    "model.linear_num_value_heads=6": ([], "model.hybrid_layer_pattern=MG"),
    "model.linear_key_head_dim=32": ([], "model.hybrid_layer_pattern=MG"),
    "model.linear_value_head_dim=32": ([], "model.hybrid_layer_pattern=MG"),
    "model.mamba_dt_rank=3": ([], "model.mamba_version=1"),
    "model.mamba_num_heads=8": (
        ["model.hybrid_layer_pattern=*-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.mamba_head_dim=16": (["model.mamba_version=1"], "model.layers.1.mamba_version=2"),
    "model.mamba_state_dim=16": (
        ["model.hybrid_layer_pattern=*-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.mamba_num_groups=4": (
        ["model.hybrid_layer_pattern=*-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "model.ffn_hidden_size=256": (
        ["model.hybrid_layer_pattern=M*E"], "model.moe_ffn_hidden_size=null",
    ),
    "model.activation=gelu": (
        ["model.hybrid_layer_pattern=M*"], "model.hybrid_layer_pattern=M*E",
    ),
    "gpu.bias_activation_fusion=true": (
        ["model.hybrid_layer_pattern=M*"], "model.hybrid_layer_pattern=M-",
    ),
    "model.add_bias_linear=true": (
        ["model.hybrid_layer_pattern=MM"], "model.hybrid_layer_pattern=M*",
    ),
    "model.moe_router_bias_update_rate=0.01": ([], "model.moe_router_enable_expert_bias=true"),
    "model.moe_router_load_balancing_type=seq_aux_loss": (
        ["model.moe_aux_loss_coeff=0"], "model.moe_aux_loss_coeff=0.1",
    ),
    "gpu.cp_comm_type=a2a": ([], "parallel.context_parallel_size=2"),
    "parallel.mamba_cp_comm_type=state_passing": ([], "parallel.context_parallel_size=2"),
    "gpu.attention_backend=flash": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "gpu.cuda_graph_modules=[attn, mamba]": (
        ["model.hybrid_layer_pattern=M-E"], "model.hybrid_layer_pattern=M*E",
    ),
    "optimizer.lr_wsd_decay_samples=5": (
        ["optimizer.lr_decay_style=WSD", "optimizer.lr_decay_samples=10_000_000"],
        "optimizer.lr_decay_samples=10",
    ),
    "optimizer.lr_wsd_decay_tokens=500": (
        ["optimizer.lr_decay_style=WSD", "optimizer.lr_decay_tokens=1_000_000_000"],
        "optimizer.lr_decay_tokens=1000",
    ),
    "training.eval_tasks_include_path=here": ([], "training.eval_tasks=[x]"),
    "training.eval_tasks_limit=5": ([], "training.eval_tasks=[x]"),
    "training.eval_tasks_num_fewshot=5": ([], "training.eval_tasks=[x]"),
    "logging.float8_interval=5": ([], "precision.emulate=true"),
    "logging.expert_load_interval=5": (
        ["model.hybrid_layer_pattern=M-"], "model.hybrid_layer_pattern=M-E",
    ),
    "logging.wandb_entity=us": ([], "logging.wandb_project=x"),
    "logging.wandb_exp_name=first": ([], "logging.wandb_project=x"),
    "logging.wandb_save_dir=here": ([], "logging.wandb_project=x"),
    "logging.mlflow_run_name=first": ([], "logging.mlflow_experiment=x"),
    "logging.mlflow_tracking_uri=http://here": ([], "logging.mlflow_experiment=x"),
}  # fmt: skip


@pytest.mark.parametrize("word", UNUSED)
def test_what_has_no_effect_is_said(word: str) -> None:
    """One sentence with field, value and reason; none where the reason is gone."""
    beside, reads = UNUSED[word]
    line = [*GOOD, *beside, word]
    name = word.partition("=")[0]
    (said,) = [note for note in notes(load_config(line, which=())) if note.startswith(name)]
    assert " has no effect: " in said
    found = notes(load_config([*line, reads], which=()))
    assert not [note for note in found if note.startswith(f"{name}=")]


def test_the_whole_table_is_tried() -> None:
    """By field."""
    named = {name for each in UNUSED_FIELDS for name in each.names}
    assert named == {word.partition("=")[0] for word in UNUSED}


def test_the_usual_states_of_the_other_mamba_are_said() -> None:
    """Where a layer of Mamba-1 has the default: no size of its own, and no other of the model's."""

    def said(*words: str) -> list[str]:
        line = [*GOOD, "model.mamba_state_dim=128", *words]
        found = notes(load_config(line, which=()))
        return [note for note in found if note.startswith("model.mamba_state_dim=128")]

    (note,) = said("model.mamba_version=1")
    assert "Mamba-1 usually have 16" in note
    assert said("model.layers.1.mamba_version=1") == [note]
    assert said() == said("model.mamba_version=1", "model.mamba_state_dim=16") == []
    assert said("model.mamba_version=1", "model.layers.M.mamba_state_dim=16") == []


# Fields that a rule refuses where nothing would read them.
REFUSED = """
    model.key_multiplier model.ssm_multipliers model.ssm_in_multiplier model.ssm_out_multiplier
    model.attention_in_multiplier model.attention_out_multiplier model.mlp_multipliers
    model.mamba_rms_norm model.mamba_inner_layernorms model.parallel_heads_join
    model.num_meta_tokens model.reuse_kv
    model.window_size model.attn_mask_type model.num_moe_experts model.moe_ffn_hidden_size
    model.moe_router_topk model.moe_shared_expert_intermediate_size model.moe_aux_loss_coeff
    model.moe_z_loss_coeff model.moe_router_score_function model.moe_router_pre_softmax
    model.moe_router_topk_scaling_factor model.moe_router_enable_expert_bias
    model.moe_expert_capacity_factor model.moe_token_dispatcher_type
    model.mtp_num_layers model.mtp_hybrid_override_pattern model.mtp_loss_scaling_factor
    model.moe_latent_size model.moe_router_num_groups model.moe_router_group_topk
    parallel.sequence_parallel parallel.virtual_pipeline_model_parallel_size
    parallel.expert_model_parallel_size parallel.expert_tensor_parallel_size
    parallel.use_distributed_optimizer parallel.overlap_param_gather
    gpu.overlap_p2p_comm gpu.align_param_gather gpu.cross_entropy_fusion_impl
    gpu.moe_permute_fusion gpu.moe_router_fusion gpu.moe_shared_expert_overlap
    precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16
    precision.fp8_param_gather precision.emulate
    data.data_path data.sources data.phases data.tokenizer_model
    training.recompute_method training.recompute_num_layers training.recompute_modules
    training.objective_options
    checkpoint.finetune
    upcycling.router_std upcycling.router_noise upcycling.reinit_fraction upcycling.scale_weights
"""
# Fields that are read whatever the others say.
READ = """
    run_dir backend preset
    model.hybrid_layer_pattern model.hidden_size model.normalization model.layernorm_epsilon
    model.init_method_std model.vocab_size model.make_vocab_size_divisible_by
    model.embedding_multiplier model.lm_head_multiplier
    model.untie_embeddings_and_output_weights model.hidden_dropout model.layers
    parallel.tensor_model_parallel_size parallel.pipeline_model_parallel_size
    parallel.context_parallel_size parallel.overlap_grad_reduce
    gpu.gradient_accumulation_fusion gpu.bias_dropout_fusion gpu.cross_entropy_loss_fusion
    gpu.cuda_graph_impl
    precision.recipe
    data.tokenizer_type data.mock_data data.num_workers
    training.micro_batch_size training.global_batch_size training.batch_size_schedule
    training.train_iters training.train_samples training.train_tokens training.seed
    training.exit_duration_in_mins training.hang_timeout_s training.profile
    training.objective training.callbacks training.eval_tasks training.nonfinite_action
    training.loss_spike_factor
    optimizer.lr optimizer.lr_decay_style optimizer.lr_warmup_samples optimizer.lr_warmup_tokens
    optimizer.lr_warmup_fraction optimizer.weight_decay optimizer.adam_beta1 optimizer.adam_beta2
    optimizer.adam_eps optimizer.clip_grad
    checkpoint.save checkpoint.load checkpoint.async_save checkpoint.keep_last
    checkpoint.verify_integrity
    upcycling.from
    logging.tensorboard logging.log_params_norm logging.wandb_project logging.mlflow_experiment
"""


def test_every_field_was_looked_at() -> None:
    """A new one is told of where nothing reads it, or refused there, or always read."""
    told = {name for each in UNUSED_FIELDS for name in each.names}
    assert sorted([*told, *REFUSED.split(), *READ.split()]) == sorted(fields())


def test_a_source_that_no_phase_reads_is_said() -> None:
    """It may wait for an edit; one with a weight of 0 is none that is read."""
    line = [*GOOD, "data.mock_data=false", "data.sources={web: {path: x}, code: {path: y}}"]
    one, both = ([*line, f"data.phases=[{{name: all, weights: {{web: 1, code: {weight}}}}}]"]
                 for weight in (0, 1))  # fmt: skip
    said = "data.sources.code has no effect: no phase has a weight for it"
    assert said in notes(load_config(one, which=()))
    assert said not in notes(load_config(both, which=()))


def test_presets_have_nothing_to_say() -> None:
    """As they are, nor does a good config."""
    for name in presets():
        line = [name, "--data-path", "x", "--tokenizer-type", "null", "--vocab-size", "256"]
        assert notes(load_config(line, which=rules.NO_FILES)) == []
    assert notes(load_config(GOOD)) == []


def test_the_length_in_tokens_counts_too() -> None:
    """The smallest batches and shortest samples make the most steps a run can have."""
    line = [*GOOD, "training.train_tokens=1e6", "training.global_batch_size=8"]
    few, many = "training.eval_interval=489", "training.eval_interval=492"
    assert not notes(load_config([*line, "data.seq_length=256", few], which=()))
    assert notes(load_config([*line, "data.seq_length=256", many], which=()))


def test_reductions_that_nobody_takes_part_in() -> None:
    """Where all ranks together hold the model once; experts may be there twice while the rest of
    their layer is not."""
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    dense = ["model.hybrid_layer_pattern=M*-", "model.num_moe_experts=null"]
    two = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    for more, ranks, said in (
        (dense, 1, 2), (dense, 2, 0), (dense, None, 0), ([], 1, 2), ([], 2, 0),
        ([*dense, *two], 2, 2), (two, 2, 0),
        ([*two, "parallel.expert_model_parallel_size=2"], 2, 2),
    ):  # fmt: skip
        config = load_config([*GOOD, *overlap, *more], which=())
        found = [each for each in notes(config, ranks) if each.startswith("parallel.overlap_")]
        assert len(found) == said, (more, ranks)
