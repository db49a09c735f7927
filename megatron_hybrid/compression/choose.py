"""Which channels, heads and experts of a model stay.

Source of the rules for Mamba-2: "Efficient Hybrid Language Model Compression through Group-Aware
SSM Pruning", 2504.11409, section 3.1: heads are ranked within their group, of which each keeps as
many; the channels that stay are the same of all heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hybrid.compression.axes import (
    EXPERTS,
    FFN,
    HIDDEN,
    MAMBA_CHANNELS,
    MAMBA_HEADS,
    QUERY_HEADS,
    SHARED,
)
from megatron_hybrid.compression.scores import DEPTH, MAMBA_SCORES, Scores, most_important, of_layer
from megatron_hybrid.compression.sizes import Kept
from megatron_hybrid.config import ModelConfig

# Of sizes that are cut by themselves, what they count.
_PLAIN = {
    "ffn_hidden_size": FFN,
    "moe_shared_expert_intermediate_size": SHARED,
    "num_moe_experts": EXPERTS,
}


def least_important_layers(scores: Scores, count: int) -> tuple[int, ...]:
    """Numbers of the `count` layers that change the residual stream least, from 1, ascending."""
    depth = scores.values[DEPTH]
    stay = set(most_important(depth, len(depth) - count).tolist())
    return tuple(place + 1 for place in range(len(depth)) if place not in stay)


def hidden_channels(model: ModelConfig, size: int, scores: Scores | None) -> Tensor:
    """Embedding channels that stay: int64 `[size]`, ascending."""
    return _chosen(model.hidden_size, size, scores, HIDDEN)


def of_kept(kept: Kept, scores: Scores | None) -> dict[str, Tensor]:
    """What stays of a layer, by the axes of `axes.stored_axes`; without scores the first ones."""
    model, number, found = kept.parent.model, kept.parent.number, {}
    for field, axis in _PLAIN.items():
        if field in kept.sizes:
            name = of_layer(number, axis)
            found[axis] = _chosen(getattr(model, field), kept.sizes[field], scores, name)
    if "num_attention_heads" in kept.sizes:
        assert model.num_attention_heads is not None and model.num_query_groups is not None
        importance = (
            _first(model.num_attention_heads)
            if scores is None
            else scores.values[of_layer(number, QUERY_HEADS)]
        )
        found[QUERY_HEADS] = in_groups(
            importance, model.num_query_groups, kept.sizes["num_attention_heads"]
        )
    if "mamba_num_heads" in kept.sizes:
        assert model.mamba_num_heads is not None
        heads, channels = kept.sizes["mamba_num_heads"], kept.sizes["mamba_head_dim"]
        values = None if scores is None else scores.values[of_layer(number, MAMBA_SCORES)]  # [H, P]
        if values is None:
            found[MAMBA_CHANNELS] = torch.arange(channels)
            importance = _first(model.mamba_num_heads)
        else:
            found[MAMBA_CHANNELS] = most_important(values.norm(dim=0), channels)
            importance = values[:, found[MAMBA_CHANNELS]].norm(dim=1)
        found[MAMBA_HEADS] = in_groups(importance, model.mamba_num_groups, heads)
    return found


def in_groups(importance: Tensor, groups: int, count: int) -> Tensor:
    """The most important heads of each group, as many of each: int64 `[count]`, ascending.

    Args:
        importance: `[heads]`; a group has neighbours.
    """
    of_group = len(importance) // groups
    each = [
        most_important(mine, count // groups) + group * of_group
        for group, mine in enumerate(importance.split(of_group))
    ]
    return torch.cat(each)


def _chosen(of: int, count: int, scores: Scores | None, name: str) -> Tensor:
    return torch.arange(count) if scores is None else most_important(scores.values[name], count)


def _first(count: int) -> Tensor:
    """An importance by which the first ones stay."""
    return -torch.arange(count, dtype=torch.float32)


def ranges(indices: Sequence[int]) -> str:
    """Ascending numbers in words: `0-5, 7`."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in found)
