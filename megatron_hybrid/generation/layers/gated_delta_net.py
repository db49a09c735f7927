"""A gated delta net as generation runs it, over the states of sequences.

Legend: T tokens of the step, h hidden size, S slots, k key heads of n channels, v value heads of p
channels, all of this rank.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.cache import MambaSlots
from megatron_hybrid.generation.layers.convolution import ConvolvingMixer
from megatron_hybrid.generation.linears import Group
from megatron_hybrid.ops.gated_delta import gated_delta_rule, gated_delta_step
from megatron_hybrid.ops.gated_delta.gates import decays_and_rates, gated_norm


class GatedDeltaNet(ConvolvingMixer):
    """A gated delta net. States are fp32: the last inputs of the convolution `[S, taps - 1, c]`,
    and those of the rule `[S, v, n, p]`."""

    def __init__(self, mixer: Any, group: Group) -> None:
        super().__init__(mixer, group)
        parts = list(mixer.in_proj_parts.values())
        self._parts = [sum(parts[:3]), *parts[3:]]
        keys, values = (mixer.key_heads, mixer.key_dim), (mixer.value_heads, mixer.value_dim)
        self._heads = [keys, keys, values]
        self._eps = mixer.config.layernorm_epsilon
        self.refresh()

    def new_slots(self, sequences: int) -> MambaSlots:
        channels, taps = self.taps.shape
        (_, state_dim), _, (heads, head_dim) = self._heads
        return MambaSlots(
            self.taps.new_zeros(sequences, taps - 1, channels),
            self.taps.new_zeros(sequences, heads, state_dim, head_dim),
        )

    def refresh(self) -> None:
        super().refresh()
        mixer = self._mixer
        self.A_log, self.dt_bias = (each.detach().float() for each in (mixer.A_log, mixer.dt_bias))
        self.norm_weight = mixer.out_norm_weight.detach()

    def mixed(self, normed: Tensor, batch: Batch) -> Tensor:
        qkv, z, beta, alpha = self.in_proj(normed).split(self._parts, dim=-1)
        decoding, slots = batch.decoding, batch.filling
        widths = [heads * channels for heads, channels in self._heads]
        parts = self._convolved(qkv, batch).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, of) for part, of in zip(parts, self._heads, strict=True))
        inputs = (q, k, v, *decays_and_rates(alpha, beta, self.A_log, self.dt_bias))
        y = torch.empty_like(v)
        if decoding:
            states = self.slots.ssm[:decoding]
            y[:decoding] = gated_delta_step(states, *(each[:decoding] for each in inputs))
        if slots is not None:
            assert batch.texts is not None
            states = self.slots.ssm[slots]  # a copy
            of_inputs = (each[decoding:].split(batch.texts.lengths) for each in inputs)
            of_texts = zip(states, *of_inputs, strict=True)
            y[decoding:] = torch.cat([self._text(state, *rest) for state, *rest in of_texts])
            self.slots.ssm[slots] = states
        gate = z.unflatten(-1, self._heads[2])
        return gated_norm(y, gate, self.norm_weight, self._eps).flatten(1)

    def _text(self, state: Tensor, *parts: Tensor) -> Tensor:
        """A part of a text, `[t, ...]` each; its state, `[v, n, p]`, moves on in place."""
        y, after = gated_delta_rule(*(part[None] for part in parts), initial_state=state[None])
        state.copy_(after[0])
        return y[0]
