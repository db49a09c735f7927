"""Mamba mixers as generation runs them, over the states of sequences.

Legend: T tokens of the step, h hidden size.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.cache import MambaSlots
from megatron_hybrid.generation.linears import Group, Linear, Norm
from megatron_hybrid.ops.mamba2_fused import Norm as NormSizes
from megatron_hybrid.ops.mamba2_states import CoreParameters, Mamba2Step, empty_states
from megatron_hybrid.ops.mamba2_texts import mamba2_texts
from megatron_hybrid.ops.ssd.buffers import Sizes


class MambaMixer:
    """A mixer of what was normed; `take` gives it its states before the first call."""

    slots: MambaSlots

    def __init__(self, mixer: Any, group: Group) -> None:
        self._mixer = mixer
        self.in_proj, self.out_proj = Linear(mixer.in_proj), Linear(mixer.out_proj, group=group)

    def new_slots(self, sequences: int) -> MambaSlots:
        """States before the first token of so many sequences."""
        raise NotImplementedError

    def take(self, slots: MambaSlots) -> None:
        """The states of sequences to work on."""
        self.slots = slots

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.in_proj, self.out_proj):
            each.refresh()

    def mixed(self, normed: Tensor, batch: Batch) -> Tensor:
        """`[T, h]` -> `[T, d]`, what the projection after it takes."""
        raise NotImplementedError


class Mamba2Mixer(MambaMixer):
    """A Mamba-2 mixer."""

    def __init__(self, mixer: Any, group: Group) -> None:
        super().__init__(mixer, group)
        self.sizes = Sizes(mixer.num_heads, mixer.head_dim, mixer.num_groups, mixer.state_dim)
        self._steps: dict[int, Mamba2Step] = {}
        self.refresh()

    def new_slots(self, sequences: int) -> MambaSlots:
        return MambaSlots(*empty_states(self.parameters, sequences))

    def take(self, slots: MambaSlots) -> None:
        super().take(slots)
        self._steps.clear()

    def refresh(self) -> None:
        super().refresh()
        mixer, norm = self._mixer, self._mixer.norm
        self.parameters = CoreParameters(
            self.sizes,
            mixer.conv1d_weight.detach().squeeze(1).t().float().contiguous(),
            mixer.conv1d_bias.detach().float(),
            mixer.dt_bias.detach().float(),
            -torch.exp(mixer.A_log.detach().float())[:, None],
            mixer.D.detach().float()[:, None],
            None if norm is None else norm.weight.detach().float(),
            None if norm is None else NormSizes(norm.group_size, norm.eps),
        )

    def mixed(self, normed: Tensor, batch: Batch) -> Tensor:
        projected = self.in_proj(normed)
        if self._mixer.multipliers:
            parts = projected.split(list(self._mixer.in_proj_parts.values()), -1)
            for part, factor in zip(parts, self._mixer.multipliers, strict=True):
                part.mul_(factor)
        decoding = batch.decoding
        if not batch.chunks:
            return self._step(decoding)(projected, self.parameters)
        y = projected.new_empty(len(projected), self.sizes.channels)
        if decoding:
            y[:decoding] = self._step(decoding)(projected[:decoding], self.parameters)
        slots, conv, ssm = batch.filling, self.slots.conv, self.slots.ssm
        assert batch.texts is not None
        taps, states = conv[slots], ssm[slots]  # copies
        mamba2_texts(projected[decoding:], self.parameters, batch.texts, taps, states, y[decoding:])
        conv[slots], ssm[slots] = taps, states
        return y

    def _step(self, sequences: int) -> Mamba2Step:
        if sequences not in self._steps:
            slots, norm = self.slots, self.parameters.norm
            self._steps[sequences] = Mamba2Step(
                self.sizes,
                slots.conv[:sequences],
                slots.ssm[:sequences],
                *(() if norm is None else (norm.eps,)),
            )
        return self._steps[sequences]


class MambaLayer:
    """A mixer with the norm before it."""

    def __init__(self, mixer: MambaMixer, in_proj: Any) -> None:
        self.norm, self.mixer = Norm(in_proj, "layer_norm_weight", in_proj.eps), mixer

    def refresh(self) -> None:
        """Take the parameters up again."""
        self.norm.refresh()
        self.mixer.refresh()

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        return self.mixer.out_proj.add_to(x, self.mixer.mixed(self.norm(x), batch))
