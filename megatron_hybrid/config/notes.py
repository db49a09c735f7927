"""What is said of a valid config before it runs.

Where it makes two functions of one model; and what it sets to no effect, which may be meant for
later, and so is not refused.
"""

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from megatron_hybrid.config.derive import DERIVED
from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.effects import differences
from megatron_hybrid.config.layers import layers, mamba_layers, mamba_versions, rotates
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
from megatron_hybrid.config.ranks import expert_ranks, model_ranks
from megatron_hybrid.config.run import RunConfig


class _Unused(NamedTuple):
    """Fields that nothing reads in some configs.

    Attributes:
        names: dotted, and of one section.
        applies: whether nothing reads them in a resolved config.
        why: the end of "FIELD=VALUE has no effect: ...".
    """

    names: tuple[str, ...]
    applies: Callable[[RunConfig], bool]
    why: str


def _attends(c: RunConfig) -> bool:
    return has_kind(c.model.hybrid_layer_pattern, ATTENTION)


def _has_mlps(c: RunConfig) -> bool:
    return MLP in c.model.hybrid_layer_pattern or MOE in c.model.hybrid_layer_pattern


def _reads_ffn_hidden_size(c: RunConfig) -> bool:
    """Experts are as wide, where nothing else is said."""
    wide = c.model.moe_ffn_hidden_size == c.model.ffn_hidden_size
    return MLP in c.model.hybrid_layer_pattern or (MOE in c.model.hybrid_layer_pattern and wide)


def _splits(c: RunConfig) -> bool:
    """Whether some source that is read has no split of its own."""
    own = [source.split for name, source in c.data.sources.items() if name in _weighed(c)]
    return not own or None in own


def _weighed(c: RunConfig) -> set[str]:
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
_TABLE = (
    _Unused(
        ("training.eval_interval",), _ends_before("training.eval_interval"),
        "the run ends before its first evaluation",
    ),
    _Unused(
        ("logging.expert_load_interval",), _ends_before("logging.expert_load_interval"),
        "the run ends before its first record",
    ),
    _Unused(
        ("logging.float8_interval",), _ends_before("logging.float8_interval"),
        "the run ends before its first record",
    ),
    _Unused(
        ("training.exit_interval",), _ends_before("training.exit_interval"),
        "the run ends before that",
    ),
    _Unused(
        ("training.log_interval",), _ends_before("training.log_interval"),
        "the run ends before its first line: no step of it is recorded",
    ),
    _Unused(
        ("checkpoint.save_interval",), _ends_before("checkpoint.save_interval"),
        "the run ends before that, and saves at its end",
    ),
    _Unused(
        ("checkpoint.load_optim", "checkpoint.load_rng", "optimizer.restart_schedule"),
        lambda c: c.checkpoint.finetune, "checkpoint.finetune=true loads weights alone",
    ),
    _Unused(
        ("checkpoint.load_optim", "checkpoint.load_rng"),
        lambda c: c.upcycling.source is not None and not c.checkpoint.finetune,
        "upcycling.from loads weights and counters alone",
    ),
    _Unused(
        ("checkpoint.load_optim",),
        lambda c: c.optimizer.restart_schedule and c.upcycling.source is None
        and not c.checkpoint.finetune,
        "optimizer.restart_schedule=true begins with a fresh optimizer",
    ),
    _Unused(
        ("training.eval_iters",), lambda c: c.training.eval_interval is None,
        "training.eval_interval=null evaluates nothing",
    ),
    _Unused(
        (
            "training.eval_tasks_include_path", "training.eval_tasks_limit",
            "training.eval_tasks_num_fewshot",
        ),
        lambda c: not c.training.eval_tasks, "training.eval_tasks=[] asks nothing",
    ),
    _Unused(
        ("training.loss_spike_action",), lambda c: c.training.loss_spike_factor is None,
        "training.loss_spike_factor=null watches for no spikes",
    ),
    _Unused(
        ("training.profile_step_start", "training.profile_step_end", "training.profile_ranks"),
        lambda c: not c.training.profile, "training.profile=false records nothing",
    ),
    _Unused(
        ("training.recompute_granularity",),
        lambda c: c.training.recompute_granularity == "selective"
        and not c.training.recompute_modules and not _attends(c),
        "training.recompute_modules=[] is the core of attention, and there is no attention",
    ),
    _Unused(
        ("model.position_embedding_type", "model.attention_dropout"), lambda c: not _attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    _Unused(
        ("model.num_attention_heads", "model.num_query_groups", "model.kv_channels"),
        lambda c: not _attends(c), "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    _Unused(
        ("model.mamba_state_dim",),
        lambda c: not has_kind(c.model.hybrid_layer_pattern, MAMBA),
        "model.hybrid_layer_pattern has neither 'M' nor 'H' layers",
    ),
    _Unused(
        ("model.mamba_version",), lambda c: not has_kind(c.model.hybrid_layer_pattern, MAMBA),
        "model.hybrid_layer_pattern has neither 'M' nor 'H' layers",
    ),
    _Unused(
        ("model.mamba_num_heads", "model.mamba_head_dim", "model.mamba_num_groups"),
        lambda c: 2 not in mamba_versions(c.model), "the model has no Mamba-2 layers",
    ),
    _Unused(
        ("model.mamba_intermediate_size", "model.mamba_dt_rank"),
        lambda c: 1 not in mamba_versions(c.model), "the model has no Mamba-1 layers",
    ),
    _Unused(
        (
            "model.linear_num_key_heads", "model.linear_num_value_heads",
            "model.linear_key_head_dim", "model.linear_value_head_dim",
        ),
        lambda c: GDN not in c.model.hybrid_layer_pattern,
        "model.hybrid_layer_pattern has no 'G' layers",
    ),
    _Unused(
        ("model.ffn_hidden_size",), lambda c: not _reads_ffn_hidden_size(c),
        "model.hybrid_layer_pattern has no '-' layers, nor 'E' layers without a width of their own",
    ),
    _Unused(
        ("model.activation", "gpu.bias_activation_fusion"), lambda c: not _has_mlps(c),
        "model.hybrid_layer_pattern has neither '-' nor 'E' layers",
    ),
    _Unused(
        ("model.add_bias_linear",), lambda c: not _has_mlps(c) and not _attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' nor '-' nor 'E' layers",
    ),
    _Unused(
        ("model.rotary_base", "model.rotary_percent"),
        lambda c: not rotates(c.model), "no layer of this model has RoPE",
    ),
    _Unused(
        ("model.moe_router_bias_update_rate",),
        lambda c: not c.model.moe_router_enable_expert_bias,
        "model.moe_router_enable_expert_bias=false has no bias to move",
    ),
    _Unused(
        ("model.moe_router_load_balancing_type",),
        lambda c: c.model.moe_router_load_balancing_type != "none"
        and not c.model.moe_aux_loss_coeff,
        "model.moe_aux_loss_coeff=0 weighs no such loss",
    ),
    _Unused(
        ("gpu.apply_rope_fusion",),
        lambda c: not rotates(c.model), "no layer of this model has RoPE",
    ),
    _Unused(
        ("gpu.cp_comm_type",), lambda c: c.parallel.context_parallel_size == 1 or not _attends(c),
        "no attention of this run is divided by parallel.context_parallel_size",
    ),
    _Unused(
        ("gpu.attention_backend",), lambda c: not _attends(c),
        "model.hybrid_layer_pattern has neither '*' nor 'H' layers",
    ),
    _Unused(
        ("gpu.cuda_graph_modules",), _graphs_what_is_not_there,
        "model.hybrid_layer_pattern has no layers with some of them",
    ),
    _Unused(
        ("gpu.cuda_graph_warmup_steps",), lambda c: c.gpu.cuda_graph_impl == "none",
        "gpu.cuda_graph_impl=none makes no graphs",
    ),
    _Unused(
        ("optimizer.lr_wsd_decay_style",), lambda c: c.optimizer.lr_decay_style != "WSD",
        "optimizer.lr_decay_style is not WSD",
    ),
    _Unused(
        ("optimizer.lr_wsd_decay_samples", "optimizer.lr_wsd_decay_tokens"), _decays_after_the_end,
        "the run ends before the final decay begins",
    ),
    _Unused(
        ("optimizer.min_lr",), lambda c: c.optimizer.lr_decay_style == "constant",
        "optimizer.lr_decay_style=constant does not decay",
    ),
    _Unused(
        ("optimizer.lr_decay_samples", "optimizer.lr_decay_tokens"),
        lambda c: c.optimizer.lr_decay_style == "constant"
        and not c.optimizer.lr_warmup_fraction,
        "optimizer.lr_decay_style=constant does not decay",
    ),
    _Unused(
        ("data.packed_documents",),
        lambda c: not recurrent_symbols(c.model.hybrid_layer_pattern) and not _attends(c),
        "no layer of this model looks from one token to another",
    ),
    _Unused(
        ("data.split",), lambda c: not _splits(c),
        "every source that is read has a split of its own",
    ),
    _Unused(
        ("data.max_epochs",),
        lambda c: bool(c.data.sources)
        and all(source.max_epochs is not None for source in c.data.sources.values()),
        "every source has max_epochs of its own",
    ),
    _Unused(
        ("data.seq_length",),
        lambda c: "data.seq_length" not in sequence_length_fields(c)
        and c.training.objective == "pretraining",  # others may go by it
        "every phase has a seq_length of its own, and nothing is evaluated",
    ),
    _Unused(
        ("logging.float8_interval",), lambda c: not c.precision.emulate,
        "precision.emulate=false emulates no float8",
    ),
    _Unused(
        ("logging.expert_load_interval",), lambda c: MOE not in c.model.hybrid_layer_pattern,
        "model.hybrid_layer_pattern has no 'E' layers",
    ),
    _Unused(
        ("data.data_cache_path",), lambda c: c.data.sample_order != "megatron" or c.data.mock_data,
        "only data.sample_order=megatron makes index files",
    ),
    _Unused(
        ("logging.wandb_entity", "logging.wandb_exp_name", "logging.wandb_save_dir"),
        lambda c: c.logging.wandb_project is None,
        "logging.wandb_project=null sends nothing to Weights & Biases",
    ),
    _Unused(
        ("logging.mlflow_run_name", "logging.mlflow_tracking_uri"),
        lambda c: c.logging.mlflow_experiment is None,
        "logging.mlflow_experiment=null sends nothing to MLflow",
    ),
    _Unused(
        ("data.max_epochs", "data.block_tokens", "data.sample_order", "data.split"),
        lambda c: c.data.mock_data, "made-up tokens have no sources",
    ),
)  # fmt: skip


def notes(config: RunConfig, world_size: int | None = None) -> list[str]:
    """A sentence for each thing that whoever starts a valid config should know of it.

    Args:
        world_size: ranks of the run; None: not known.
    """
    unused = [
        f"{name}={_typed(value)} has no effect: {each.why}"
        for each in _TABLE
        if each.applies(config)
        for name, value in _set(config, each.names)
    ]
    of_fields = differences(config) + unused
    return [
        *of_fields, *_unread_sources(config), *_unread_sizes(config), *_states_of_mamba1(config),
        *_alone(config, world_size),
    ]  # fmt: skip


def _alone(c: RunConfig, world_size: int | None) -> list[str]:
    """What overlaps with reductions of gradients, where no two ranks have one to reduce."""
    copies = [prod(model_ranks(c).values()) // c.parallel.context_parallel_size]
    if MOE in c.model.hybrid_layer_pattern:
        copies.append(prod(expert_ranks(c).values()))
    if any(ranks != world_size for ranks in copies):
        return []
    return [
        f"{name}=true has no effect: the run's ranks, {world_size}, hold the model once"
        for name, _ in _set(c, ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather"))
    ]


def _unread_sources(c: RunConfig) -> list[str]:
    return [
        f"data.sources.{name} has no effect: no phase has a weight for it"
        for name in c.data.sources
        if name not in _weighed(c)
    ]


def _states_of_mamba1(c: RunConfig) -> list[str]:
    """That the default is Mamba-2's, where nobody has said the size of Mamba-1."""
    name, size = "model.mamba_state_dim", c.model.mamba_state_dim
    theirs = any(layer.path("mamba_state_dim") == name for layer in mamba_layers(c.model, 1))
    if not theirs or size != fields()[name].default:
        return []
    return [
        f"{name}={size}, the default, is usual for Mamba-2: layers of Mamba-1 usually have 16, and "
        "the time and memory of their scan go by it"
    ]


# Sizes from which others of the model follow.
_DERIVED_FROM = (
    "ffn_hidden_size", "num_attention_heads", "mamba_head_dim", "linear_num_key_heads",
    "linear_key_head_dim",
)  # fmt: skip


def _unread_sizes(c: RunConfig) -> list[str]:
    """The model's sizes that no layer has, as each has one of its own."""
    if not c.model.layers:
        return []
    resolved = layers(c.model)
    names = dict.fromkeys(name for layer in resolved for name in layer.sizes)
    unread = [
        f"model.{name}"
        for name in names
        if name not in _DERIVED_FROM
        and all(name in layer.keys for layer in resolved if name in layer.sizes)
    ]
    return [
        f"{name}={_typed(value)} has no effect: model.layers says it of every layer"
        for name, value in _set(c, tuple(unread))
    ]


def _set(config: RunConfig, names: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    for name in names:
        section, _, leaf = name.partition(".")
        value = getattr(getattr(config, section), leaf)
        derived = DERIVED[name](config) if name in DERIVED else None
        if value not in (fields()[name].default, derived):
            yield name, value


def _typed(value: object) -> str:
    return str(value) if isinstance(value, str | Path) else shown(value)
