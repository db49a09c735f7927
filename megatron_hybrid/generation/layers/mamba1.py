"""A Mamba-1 mixer as generation runs it, over the states of sequences.

Legend: T tokens of the step, h hidden size, S slots, d channels of this rank, n state.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.cache import MambaSlots
from megatron_hybrid.generation.layers.convolution import ConvolvingMixer
from megatron_hybrid.generation.layers.mamba import Mamba2Mixer, MambaMixer
from megatron_hybrid.generation.linears import Group, Linear, Norm, sum_over
from megatron_hybrid.layers import mamba1
from megatron_hybrid.ops.selective_scan import selective_scan
from megatron_hybrid.ops.selective_scan.torch_chunked import selective_scan_step


class _Weight:
    """One of the mixer's own weights, as a linear's."""

    bias = None

    def __init__(self, mixer: Any, name: str) -> None:
        self._mixer, self._name = mixer, name

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self._mixer, self._name)
        return weight


class Mamba1Mixer(ConvolvingMixer):
    """A Mamba-1 mixer. States are fp32: the last inputs of the convolution `[S, taps - 1, d]`, and
    those of the scan `[S, n, d]`."""

    def __init__(self, mixer: Any, group: Group) -> None:
        super().__init__(mixer, group)
        self._group = group
        norms = (
            (mixer.dt_layernorm, mixer.B_layernorm, mixer.C_layernorm)
            if mixer.inner_layernorms
            else ()
        )
        self.norms = [Norm(norm, "weight", norm.eps) for norm in norms]
        self.x_proj, self.dt_proj = (
            Linear(_Weight(self._mixer, name)) for name in ("x_proj_weight", "dt_proj_weight")
        )
        self.refresh()

    def new_slots(self, sequences: int) -> MambaSlots:
        taps, (state, channels) = self.taps.shape[1], self.A.shape
        return MambaSlots(
            self.A.new_zeros(sequences, taps - 1, channels),
            self.A.new_zeros(sequences, state, channels),
        )

    def refresh(self) -> None:
        super().refresh()
        refreshed: list[Linear | Norm] = [self.x_proj, self.dt_proj, *self.norms]
        for each in refreshed:
            each.refresh()
        mixer = self._mixer
        self.A = -torch.exp(mixer.A_log.detach().float()).t().contiguous()  # [n, d]
        self.D, self.dt_bias = mixer.D.detach().float(), mixer.dt_bias.detach().float()

    def mixed(self, normed: Tensor, batch: Batch) -> Tensor:
        return self.scanned(self.in_proj(normed), batch)

    def scanned(self, projected: Tensor, batch: Batch) -> Tensor:
        """`[T, 2d]` -> `[T, d]`."""
        inputs, z = projected.chunk(2, dim=-1)
        decoding, slots = batch.decoding, batch.filling
        lengths = [] if batch.texts is None else batch.texts.lengths
        y = self._convolved(inputs, batch)
        shared = sum_over(self.x_proj(y), self._group)
        n = len(self.A)
        low, B, C = shared.split([shared.shape[1] - 2 * n, n, n], dim=-1)
        if self.norms:
            low, B, C = (norm(x) for norm, x in zip(self.norms, (low, B, C), strict=True))
        dt = self.dt_proj(low.contiguous())
        if decoding:
            token = [each[:decoding] for each in (y, dt, B, C, z)]
            y[:decoding] = self._step(self.slots.ssm[:decoding], *token)
        if slots is not None:
            states = self.slots.ssm[slots]  # a copy
            parts = (each[decoding:].split(lengths) for each in (y, dt, B, C, z))
            of_texts = zip(states, *parts, strict=True)
            y[decoding:] = torch.cat([self._text(state, *rest) for state, *rest in of_texts])
            self.slots.ssm[slots] = states
        return y

    def _step(
        self, states: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor
    ) -> Tensor:
        return selective_scan_step(states, x, dt, self.A, B, C, self.D, z, self.dt_bias)

    def _text(
        self, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor
    ) -> Tensor:
        """A part of a text, `[t, .]`; its state, `[n, d]`, moves on in place."""
        y, after = selective_scan(
            x[None], dt[None], self.A.t(), B[None], C[None], self.D, z[None], self.dt_bias,
            initial_state=state.t()[None],
        )  # fmt: skip
        state.copy_(after[0].t())
        return y[0]


def mamba_mixer(layer: Any, group: Group) -> MambaMixer:
    """The Mamba mixer of a layer, of its version."""
    kind = Mamba1Mixer if isinstance(layer.mixer, mamba1.Mamba1Mixer) else Mamba2Mixer
    return kind(layer.mixer, group)
