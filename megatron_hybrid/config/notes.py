"""What is said of a valid config before it runs.

Where it makes two functions of one model; and what it sets to no effect, which may be meant for
later, and so is not refused.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from megatron_hybrid.config.derive import DERIVED
from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.effects import differences
from megatron_hybrid.config.layers import layers, mamba_layers
from megatron_hybrid.config.pattern import MOE
from megatron_hybrid.config.ranks import expert_ranks, model_ranks
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.unused import UNUSED_FIELDS, weighed


def notes(config: RunConfig, world_size: int | None = None) -> list[str]:
    """A sentence for each thing that whoever starts a valid config should know of it.

    Args:
        world_size: ranks of the run; None: not known.
    """
    unused = [
        f"{name}={_typed(value)} has no effect: {each.why}"
        for each in UNUSED_FIELDS
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
        if name not in weighed(c)
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
