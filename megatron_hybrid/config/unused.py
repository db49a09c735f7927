"""Which fields nothing reads in which configs: a table, and why."""

from collections.abc import Callable
from typing import NamedTuple

from megatron_hybrid.config.layer_entries import mamba_versions
from megatron_hybrid.config.layers import rotates
from megatron_hybrid.config.lengths import lengths
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    MAMBA,
    MLP,
    MOE,
    has_kind,
    recurrent_symbols,
)
from megatron_hybrid.config.phases import (
    batch_sizes,
    run_tokens,
    sequence_length_fields,
    sequence_lengths,
)
from megatron_hybrid.config.run import RunConfig


class Unused(NamedTuple):
    """Fields that nothing reads in some configs.

    Attributes:
        names: dotted, and of one section.
        applies: whether nothing reads them in a resolved config.
        why: the end of "FIELD=VALUE has no effect: ...".
    """

    names: tuple[str, ...]
    applies: Callable[[RunConfig], bool]
    why: str


def attends(c: RunConfig) -> bool:
    return has_kind(c.model.hybrid_layer_pattern, ATTENTION)


def _has_mlps(c: RunConfig) -> bool:
    return MLP in c.model.hybrid_layer_pattern or MOE in c.model.hybrid_layer_pattern


def _reads_ffn_hidden_size(c: RunConfig) -> bool:
    """Experts are as wide, where nothing else is said."""
    wide = c.model.moe_ffn_hidden_size == c.model.ffn_hidden_size
    return MLP in c.model.hybrid_layer_pattern or (MOE in c.model.hybrid_layer_pattern and wide)


def _splits(c: RunConfig) -> bool:
    """Whether some source that is read has no split of its own."""
    own = [source.split for name, source in c.data.sources.items() if name in weighed(c)]
    return not own or None in own


def weighed(c: RunConfig) -> set[str]:
    """Sources that some phase reads."""
    return {name for phase in c.data.phases for name, weight in phase.weights.items() if weight}


# The parts that graphs hold, by the layers that have them.
_GRAPHED = {
    "attn": ATTENTION, "mlp": MLP, "mamba": MAMBA,
    "moe": MOE, "moe_router": MOE, "moe_preprocess": MOE,
}  # fmt: skip


def _graphs_what_is_not_there(c: RunConfig) -> bool:
    return any(
        not has_kind(c.model.hybrid_layer_pattern, _GRAPHED[m]) for m in c.gpu.cuda_graph_modules
    )


def _most_steps(c: RunConfig) -> int:
    """No run of this config has more."""
    if c.training.train_iters is not None:
        return c.training.train_iters
    smallest = min(size for _, size in batch_sizes(c)) * min(sequence_lengths(c))
    # The last batch of each phase may be short, and each change of the batch size comes late.
    return -(-run_tokens(c) // smallest) + len(c.data.phases) + len(batch_sizes(c))


def _ends_before(name: str) -> Callable[[RunConfig], bool]:
    section, _, leaf = name.partition(".")

    def applies(c: RunConfig) -> bool:
        interval: int | None = getattr(getattr(c, section), leaf)
        return interval is not None and interval > _most_steps(c)

    return applies


def _decays_after_the_end(c: RunConfig) -> bool:
    if c.optimizer.lr_decay_style != "WSD":
        return False
    found = lengths(c)
    final = found.wsd_decay_tokens
    return final is not None and found.decay_tokens - final >= found.train_tokens


# Only values other than the default are told of.
UNUSED_FIELDS = (
    Unused(
        ("training.eval_interval",), _ends_before("training.eval_interval"),
        "the run ends before its first evaluation",
    ),
    Unused(
        ("logging.expert_load_interval",), _ends_before("logging.expert_load_interval"),
        "the run ends before its first record",
    ),
    Unused(
        ("logging.float8_interval",), _ends_before("logging.float8_interval"),
        "the run ends before its first record",
    ),
    Unused(
        ("training.exit_interval",), _ends_before("training.exit_interval"),
        "the run ends before that",
    ),
    Unused(
        ("training.log_interval",), _ends_before("training.log_interval"),
        "the run ends before its first line: no step of it is recorded",
    ),
    Unused(
        ("checkpoint.save_interval",), _ends_before("checkpoint.save_interval"),
        "the run ends before that, and saves at its end",
    ),
    Unused(
        ("checkpoint.load_optim", "checkpoint.load_rng", "optimizer.restart_schedule"),
        lambda c: c.checkpoint.finetune, "checkpoint.finetune=true loads weights alone",
    ),
    Unused(
        ("checkpoint.load_optim", "checkpoint.load_rng"),
        lambda c: c.upcycling.source is not None and not c.checkpoint.finetune,
        "upcycling.from loads weights and counters alone",
    ),
    Unused(
        ("checkpoint.load_optim",),
        lambda c: c.optimizer.restart_schedule and c.upcycling.source is None
        and not c.checkpoint.finetune,
        "optimizer.restart_schedule=true begins with a fresh optimizer",
    ),
    Unused(
        ("training.eval_iters",), lambda c: c.training.eval_interval is None,
        "training.eval_interval=null evaluates nothing",
    ),
    Unused(
        (
            "training.eval_tasks_include_path", "training.eval_tasks_limit",
            "training.eval_tasks_num_fewshot",
        ),
        lambda c: not c.training.eval_tasks, "training.eval_tasks=[] asks nothing",
    ),
    Unused(
        ("training.loss_spike_action",), lambda c: c.training.loss_spike_factor is None,
        "training.loss_spike_factor=null watches for no spikes",
    ),
    Unused(
        ("training.profile_step_start", "training.profile_step_end", "training.profile_ranks"),
        lambda c: not c.training.profile, "training.profile=false records nothing",
    ),
    Unused(
        ("training.recompute_granularity",),
        lambda c: c.training.recompute_granularity == "selective"
        and not c.training.recompute_modules and not attends(c),
        "training.recompute_modules=[] is the core of attention, and there is no attention",
    ),
    Unused(
        ("model.position_embedding_type", "model.attention_dropout"), lambda c: not attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    Unused(
        ("model.num_attention_heads", "model.num_query_groups", "model.kv_channels"),
        lambda c: not attends(c), "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    Unused(
        ("model.mamba_state_dim",),
        lambda c: not has_kind(c.model.hybrid_layer_pattern, MAMBA),
        "model.hybrid_layer_pattern has neither 'M' nor 'H' layers",
    ),
    Unused(
        ("model.mamba_version",), lambda c: not has_kind(c.model.hybrid_layer_pattern, MAMBA),
        "model.hybrid_layer_pattern has neither 'M' nor 'H' layers",
    ),
    Unused(
        ("model.mamba_num_heads", "model.mamba_head_dim", "model.mamba_num_groups"),
        lambda c: 2 not in mamba_versions(c.model), "the model has no Mamba-2 layers",
    ),
    Unused(
        ("model.mamba_intermediate_size", "model.mamba_dt_rank"),
        lambda c: 1 not in mamba_versions(c.model), "the model has no Mamba-1 layers",
    ),
    Unused(
        (
            "model.linear_num_key_heads", "model.linear_num_value_heads",
            "model.linear_key_head_dim", "model.linear_value_head_dim",
        ),
        lambda c: GDN not in c.model.hybrid_layer_pattern,
        "model.hybrid_layer_pattern has no 'G' layers",
    ),
    Unused(
        ("model.ffn_hidden_size",), lambda c: not _reads_ffn_hidden_size(c),
        "model.hybrid_layer_pattern has no '-' layers, nor 'E' layers without a width of their own",
    ),
    Unused(
        ("model.activation", "gpu.bias_activation_fusion"), lambda c: not _has_mlps(c),
        "model.hybrid_layer_pattern has neither '-' nor 'E' layers",
    ),
    Unused(
        ("model.add_bias_linear",), lambda c: not _has_mlps(c) and not attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' nor '-' nor 'E' layers",
    ),
    Unused(
        ("model.rotary_base", "model.rotary_percent"),
        lambda c: not rotates(c.model), "no layer of this model has RoPE",
    ),
    Unused(
        ("model.moe_router_bias_update_rate",),
        lambda c: not c.model.moe_router_enable_expert_bias,
        "model.moe_router_enable_expert_bias=false has no bias to move",
    ),
    Unused(
        ("model.moe_router_load_balancing_type",),
        lambda c: c.model.moe_router_load_balancing_type != "none"
        and not c.model.moe_aux_loss_coeff,
        "model.moe_aux_loss_coeff=0 weighs no such loss",
    ),
    Unused(
        ("gpu.apply_rope_fusion",),
        lambda c: not rotates(c.model), "no layer of this model has RoPE",
    ),
    Unused(
        ("gpu.cp_comm_type",), lambda c: c.parallel.context_parallel_size == 1 or not attends(c),
        "no attention of this run is divided by parallel.context_parallel_size",
    ),
    Unused(
        ("parallel.mamba_cp_comm_type",),
        lambda c: c.parallel.context_parallel_size == 1
        or not recurrent_symbols(c.model.hybrid_layer_pattern),
        "no layer with a state is divided by parallel.context_parallel_size",
    ),
    Unused(
        ("gpu.attention_backend",), lambda c: not attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    Unused(
        ("gpu.cuda_graph_modules",), _graphs_what_is_not_there,
        "model.hybrid_layer_pattern has no layers with some of them",
    ),
    Unused(
        ("gpu.cuda_graph_warmup_steps",), lambda c: c.gpu.cuda_graph_impl == "none",
        "gpu.cuda_graph_impl=none makes no graphs",
    ),
    Unused(
        ("optimizer.lr_wsd_decay_style",), lambda c: c.optimizer.lr_decay_style != "WSD",
        "optimizer.lr_decay_style is not WSD",
    ),
    Unused(
        ("optimizer.lr_wsd_decay_samples", "optimizer.lr_wsd_decay_tokens"), _decays_after_the_end,
        "the run ends before the final decay begins",
    ),
    Unused(
        ("optimizer.min_lr",), lambda c: c.optimizer.lr_decay_style == "constant",
        "optimizer.lr_decay_style=constant does not decay",
    ),
    Unused(
        ("optimizer.lr_decay_samples", "optimizer.lr_decay_tokens"),
        lambda c: c.optimizer.lr_decay_style == "constant"
        and not c.optimizer.lr_warmup_fraction,
        "optimizer.lr_decay_style=constant does not decay",
    ),
    Unused(
        ("data.packed_documents",),
        lambda c: not recurrent_symbols(c.model.hybrid_layer_pattern) and not attends(c),
        "no layer of this model looks from one token to another",
    ),
    Unused(
        ("data.split",), lambda c: not _splits(c),
        "every source that is read has a split of its own",
    ),
    Unused(
        ("data.max_epochs",),
        lambda c: bool(c.data.sources)
        and all(source.max_epochs is not None for source in c.data.sources.values()),
        "every source has max_epochs of its own",
    ),
    Unused(
        ("data.seq_length",),
        lambda c: "data.seq_length" not in sequence_length_fields(c)
        and c.training.objective == "pretraining",  # others may go by it
        "every phase has a seq_length of its own, and nothing is evaluated",
    ),
    Unused(
        ("logging.float8_interval",), lambda c: not c.precision.emulate,
        "precision.emulate=false emulates no float8",
    ),
    Unused(
        ("logging.expert_load_interval",), lambda c: MOE not in c.model.hybrid_layer_pattern,
        "model.hybrid_layer_pattern has no 'E' layers",
    ),
    Unused(
        ("data.data_cache_path",), lambda c: c.data.sample_order != "megatron" or c.data.mock_data,
        "only data.sample_order=megatron makes index files",
    ),
    Unused(
        ("logging.wandb_entity", "logging.wandb_exp_name", "logging.wandb_save_dir"),
        lambda c: c.logging.wandb_project is None,
        "logging.wandb_project=null sends nothing to Weights & Biases",
    ),
    Unused(
        ("logging.mlflow_run_name", "logging.mlflow_tracking_uri"),
        lambda c: c.logging.mlflow_experiment is None,
        "logging.mlflow_experiment=null sends nothing to MLflow",
    ),
    Unused(
        ("data.max_epochs", "data.block_tokens", "data.sample_order", "data.split"),
        lambda c: c.data.mock_data, "made-up tokens have no sources",
    ),
)  # fmt: skip
