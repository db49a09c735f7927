"""Attention and Mamba-2 side by side as generation runs them.

Legend: T tokens of the step, h hidden size.
"""

from typing import Any

from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.layers.attention import Attention
from megatron_hybrid.generation.layers.mamba import Mamba2Mixer
from megatron_hybrid.generation.linears import Group, Norm, sum_over


class ParallelHeadsLayer:
    """Both mixers with the norm before them; each has states of its own."""

    def __init__(self, layer: Any, group: Group) -> None:
        self.attention, self.mamba = Attention(layer, group), Mamba2Mixer(layer, group)
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
        joined = out_proj.product(self.mamba.mixed(normed, batch)).mul_(factors.ssm_out)
        if factors.attention_in != 1:
            normed = normed.mul_(factors.attention_in)
        attended = proj.product(self.attention.mixed(normed, batch, rotary))
        joined = sum_over(joined.add_(attended, alpha=factors.attention_out), self._group)
        if proj.bias is not None:
            joined.add_(proj.bias, alpha=factors.attention_out)
        return x.add_(joined)
