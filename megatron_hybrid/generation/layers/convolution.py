"""The causal convolution of mixers as generation runs it, over the last inputs of sequences.

Legend: T tokens of the step, S slots, c convolved channels of this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.layers.mamba import MambaMixer
from megatron_hybrid.ops.causal_conv1d import causal_conv1d


class ConvolvingMixer(MambaMixer):
    """A mixer whose convolution is an operation of its own; `slots.conv` is `[S, taps - 1, c]`."""

    def refresh(self) -> None:
        super().refresh()
        mixer = self._mixer
        self.taps = mixer.conv1d_weight.detach().squeeze(1).float()  # [c, taps]
        self.taps_by_token = self.taps.t().contiguous()
        bias = getattr(mixer, "conv1d_bias", None)
        self.conv_bias = None if bias is None else bias.detach().float()

    def _convolved(self, inputs: Tensor, batch: Batch) -> Tensor:
        """`[T, c]` -> `[T, c]`; the inputs that come after are remembered."""
        decoding, slots = batch.decoding, batch.filling
        y = torch.empty_like(inputs)
        if decoding:
            y[:decoding] = self._convolve_token(inputs[:decoding])
        if slots is not None:
            assert batch.texts is not None
            conv = self.slots.conv[slots]  # a copy
            of_texts = zip(conv, inputs[decoding:].split(batch.texts.lengths), strict=True)
            y[decoding:] = torch.cat([self._convolve_text(*each) for each in of_texts])
            self.slots.conv[slots] = conv
        return y

    def _convolve_token(self, x: Tensor) -> Tensor:
        """One token of each of the first sequences, `[b, c]`."""
        before = self.slots.conv[: len(x)]
        window = torch.cat((before, x[:, None].float()), 1)
        before.copy_(window[:, 1:])
        total = window.mul_(self.taps_by_token).sum(1)
        if self.conv_bias is not None:
            total = total.add_(self.conv_bias)
        return F.silu(total, inplace=True).to(x.dtype)

    def _convolve_text(self, before: Tensor, x: Tensor) -> Tensor:
        """A part of a text, `[t, c]`; the inputs before it, `[taps - 1, c]`, move on in place."""
        window = torch.cat((before, x.float()))
        convolved = causal_conv1d(window[None], self.taps, self.conv_bias)
        assert isinstance(convolved, Tensor)
        before.copy_(window[len(x) :])
        return convolved[0, len(before) :].to(x.dtype)
