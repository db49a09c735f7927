"""What is said of a valid config before it runs.

Where it makes two functions of one model; and what it sets to no effect, which may be meant for
later, and so is not refused.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.effects import differences
from megatron_hybrid.config.pattern import ATTENTION
from megatron_hybrid.config.phases import batch_sizes, run_tokens, sequence_lengths
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
    return ATTENTION in c.model.hybrid_layer_pattern


def _most_steps(c: RunConfig) -> int:
    """No run of this config has more."""
    if c.training.train_iters is not None:
        return c.training.train_iters
    smallest = min(size for _, size in batch_sizes(c)) * min(sequence_lengths(c))
    # The last batch of each phase may be short, and each change of the batch size comes late.
    return -(-run_tokens(c) // smallest) + len(c.data.phases) + len(batch_sizes(c))


def _ends_before(name: str) -> Callable[[RunConfig], bool]:
    def applies(c: RunConfig) -> bool:
        interval: int | None = getattr(c.training, name)
        return interval is not None and interval > _most_steps(c)

    return applies


# Only values other than the default are told of.
_TABLE = (
    _Unused(
        ("training.eval_interval",), _ends_before("eval_interval"),
        "the run ends before its first evaluation",
    ),
    _Unused(
        ("training.exit_interval",), _ends_before("exit_interval"), "the run ends before that",
    ),
    _Unused(
        ("training.eval_iters",), lambda c: c.training.eval_interval is None,
        "training.eval_interval=null evaluates nothing",
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
        "training.recompute_modules=[] is the core of attention, and there are no '*' layers",
    ),
    _Unused(
        ("model.position_embedding_type", "model.attention_dropout"), lambda c: not _attends(c),
        "model.hybrid_layer_pattern has no '*' layers",
    ),
    _Unused(
        ("model.rotary_base", "model.rotary_percent"),
        lambda c: c.model.position_embedding_type != "rope",
        "model.position_embedding_type is not rope",
    ),
    _Unused(
        ("gpu.apply_rope_fusion",),
        lambda c: c.model.position_embedding_type != "rope" or not _attends(c),
        "no layer of this model has RoPE",
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
        ("optimizer.min_lr",), lambda c: c.optimizer.lr_decay_style == "constant",
        "optimizer.lr_decay_style=constant does not decay",
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
        ("data.max_epochs", "data.block_tokens", "data.sample_order"),
        lambda c: c.data.mock_data, "made-up tokens have no sources",
    ),
)  # fmt: skip


def notes(config: RunConfig) -> list[str]:
    """A sentence for each thing that whoever starts a valid config should know of it."""
    return differences(config) + [
        f"{name}={_typed(value)} has no effect: {each.why}"
        for each in _TABLE
        for name, value in _set(config, each.names)
        if each.applies(config)
    ]


def _set(config: RunConfig, names: tuple[str, ...]) -> Iterator[tuple[str, object]]:
    for name in names:
        section, _, leaf = name.partition(".")
        value = getattr(getattr(config, section), leaf)
        if value != fields()[name].default:
            yield name, value


def _typed(value: object) -> str:
    return value if isinstance(value, str) else shown(value)
