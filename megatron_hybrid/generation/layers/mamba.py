"""A Mamba-2 mixer as generation runs it, over the states of sequences.

Legend: T tokens of the step, h hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.cache import MambaSlots
from megatron_hybrid.generation.linears import Group, Linear, Norm
from megatron_hybrid.ops.mamba2_fused import Norm as NormSizes
from megatron_hybrid.ops.mamba2_states import CoreParameters, Mamba2Step
from megatron_hybrid.ops.mamba2_texts import mamba2_texts
from megatron_hybrid.ops.ssd.buffers import Sizes


class MambaLayer:
    """A Mamba-2 mixer; `take` gives it its states before the first call."""

    def __init__(self, layer: Any, group: Group) -> None:
        self._mixer = mixer = layer.mixer
        self.norm = Norm(mixer.in_proj, "layer_norm_weight", mixer.in_proj.eps)
        self.in_proj, self.out_proj = Linear(mixer.in_proj), Linear(mixer.out_proj, group=group)
        self.sizes = Sizes(mixer.num_heads, mixer.head_dim, mixer.num_groups, mixer.state_dim)
        self._steps: dict[int, Mamba2Step] = {}
        self.refresh()

    def take(self, slots: MambaSlots) -> None:
        """The states of sequences to work on."""
        self.slots = slots
        self._steps.clear()

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.in_proj, self.out_proj):
            each.refresh()
        mixer = self._mixer
        self.parameters = CoreParameters(
            self.sizes,
            mixer.conv1d_weight.detach().squeeze(1).t().float().contiguous(),
            mixer.conv1d_bias.detach().float(),
            mixer.dt_bias.detach().float(),
            -torch.exp(mixer.A_log.detach().float())[:, None],
            mixer.D.detach().float()[:, None],
            mixer.norm.weight.detach().float(),
            NormSizes(mixer.norm.group_size, mixer.norm.eps),
        )

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        projected = self.in_proj(self.norm(x))
        decoding = batch.decoding
        if not batch.chunks:
            return self.out_proj.add_to(x, self._step(decoding)(projected, self.parameters))
        y = projected.new_empty(len(x), self.sizes.channels)
        if decoding:
            y[:decoding] = self._step(decoding)(projected[:decoding], self.parameters)
        slots, conv, ssm = batch.filling, self.slots.conv, self.slots.ssm
        assert batch.texts is not None
        taps, states = conv[slots], ssm[slots]  # copies
        mamba2_texts(projected[decoding:], self.parameters, batch.texts, taps, states, y[decoding:])
        conv[slots], ssm[slots] = taps, states
        return self.out_proj.add_to(x, y)

    def _step(self, sequences: int) -> Mamba2Step:
        if sequences not in self._steps:
            slots = self.slots
            self._steps[sequences] = Mamba2Step(
                self.sizes,
                slots.conv[:sequences],
                slots.ssm[:sequences],
                self.parameters.norm.eps,
            )
        return self._steps[sequences]
