"""Attention and Mamba side by side as generation runs them.

Legend: T tokens of the step, h hidden size; k key/value heads of r query heads each, c channels of
queries and keys, v of values, d = k * r * v channels of Mamba.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.layers.attention import Attention, rotate
from megatron_hybrid.generation.layers.mamba1 import Mamba1Mixer, mamba_mixer
from megatron_hybrid.generation.linears import Group, Norm, sum_over
from megatron_hybrid.layers.norm import ShardedRMSNorm
from megatron_hybrid.layers.shared_heads import SharedHeads


class ParallelHeadsLayer:
    """Both mixers with the norm before them; each has states of its own."""

    def __init__(self, layer: Any, group: Group) -> None:
        self.attention, self.mamba = Attention(layer, group), mamba_mixer(layer, group)
        self.norm = Norm(layer.input_layernorm, "weight", layer.config.layernorm_epsilon)
        self._factors, self._group = layer.factors, group

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.attention, self.mamba):
            each.refresh()

    def __call__(self, x: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        factors, normed = self._factors, self.norm(x)
        proj, out_proj = self.attention.proj, self.mamba.out_proj
        scaled = normed if factors.ssm_in == 1 else normed * factors.ssm_in
        joined = out_proj.product(self.mamba.mixed(scaled, batch)).mul_(factors.ssm_out)
        if factors.attention_in != 1:
            normed = normed.mul_(factors.attention_in)
        attended = proj.product(self.attention.mixed(normed, batch, rotary))
        joined = sum_over(joined.add_(attended, alpha=factors.attention_out), self._group)
        if proj.bias is not None:
            joined.add_(proj.bias, alpha=factors.attention_out)
        return x.add_(joined)


class SharedHeadsAttention(Attention):
    """Attention of what is projected already, to keys and values of its own or of another layer.

    Args:
        producer: the other; None: its own.
    """

    def __init__(self, layer: Any, producer: "SharedHeadsAttention | None") -> None:
        mixer = layer.mixer
        self.producer = producer
        names = "qkv" if producer is None else "q"
        self._sizes = [mixer.in_proj_parts[name] for name in names]
        queries = mixer.heads // mixer.groups
        self.num_meta_tokens = mixer.core_attention.num_meta_tokens
        self._size(layer, mixer.groups, queries, mixer.channels, mixer.value_channels)

    def refresh(self) -> None:
        """It has no parameters."""

    def of_projected(
        self, projected: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """`[T, k * (r * c + c + v)]`, or `[T, k * r * c]` -> `[T, d]`."""
        q, *own = projected.split(self._sizes, dim=-1)
        query = q.unflatten(-1, (self.heads, self.queries, self.channels))
        if rotary is not None:
            rotate(query, *rotary)
        if self.producer is not None:
            key, value = self.producer.latest
            return self._attended(query, key, value, batch, kept=True)
        key = own[0].unflatten(-1, (self.heads, self.channels))
        if rotary is not None:
            rotate(key.unsqueeze(2), *rotary)
        value = own[1].unflatten(-1, (self.heads, self.value_channels))
        self.latest = key, value
        return self._attended(query, key, value, batch)


class SharedHeadsLayer:
    """Both mixers between one projection to them and one of the mean of their normed outputs.

    Args:
        producer: whose keys and values it reuses, where it does.
    """

    def __init__(self, layer: Any, group: Group, producer: "SharedHeadsAttention | None") -> None:
        mixer = layer.mixer
        self.attention = SharedHeadsAttention(layer, producer)
        self.mamba = Mamba1Mixer(layer.mixer, group)
        self.norm = Norm(mixer.in_proj, "layer_norm_weight", mixer.in_proj.eps)
        self._attention_norm = _NormOfRanks(mixer.attention_norm, group)
        self._ssm_norm = _NormOfRanks(mixer.ssm_norm, group)

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.mamba, self._attention_norm, self._ssm_norm):
            each.refresh()

    def __call__(self, x: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        mamba = self.mamba
        projected = mamba.in_proj(self.norm(x))
        width = projected.shape[1] - 2 * mamba.A.shape[1]
        scanned = mamba.scanned(projected[:, width:], batch)
        attended = self.attention.of_projected(projected[:, :width], batch, rotary)
        joined = self._attention_norm(attended).add_(self._ssm_norm(scanned)).mul_(0.5)
        return mamba.out_proj.add_to(x, joined)


class _NormOfRanks:
    """RMSNorm over channels of which each TP rank has a part."""

    def __init__(self, module: ShardedRMSNorm, group: Group) -> None:
        self._module, self._group = module, group
        self._all = module.group_size * module.tp_group.size()
        self.refresh()

    def refresh(self) -> None:
        """Take the parameter up again."""
        self._weight = self._module.weight.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, d]` -> `[T, d]`, same dtype."""
        wide = x.float()
        total = sum_over(torch.linalg.vecdot(wide, wide)[:, None], self._group)
        inverse = torch.rsqrt_(total.div_(self._all).add_(self._module.eps))
        return (wide * inverse).mul_(self._weight).to(x.dtype)


def parallel_heads(
    layer: Any, group: Group, before: Sequence[Any]
) -> ParallelHeadsLayer | SharedHeadsLayer:
    """A layer with both mixers, by how their outputs are joined.

    Args:
        before: the layers of its pipeline chunk that come before it.
    """
    if not isinstance(layer, SharedHeads):
        return ParallelHeadsLayer(layer, group)
    producer = None
    if layer.mixer.reuse_kv:
        attentions = [each.attention for each in before if isinstance(each, SharedHeadsLayer)]
        producer = [each for each in attentions if each.producer is None][-1]
    return SharedHeadsLayer(layer, group, producer)
