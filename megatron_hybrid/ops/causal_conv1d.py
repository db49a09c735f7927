"""Depthwise causal convolution over tokens, then SiLU; taps never cross a document.

Shapes: b batch, l tokens, c channels, k taps. Weights are [c, k], the last tap on the token itself.
A conv state is [b, c, k]: a row's last k inputs, oldest first, as mamba-ssm keeps it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.segments import number_documents


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SiLU(bias + sum over k of weight[:, k] * x[t - (K - 1 - k)]), differentiable by autograd.

    Args:
        x: inputs [b, l, c]; computed in float64 if float64, else in float32.
        weight: taps [c, k].
        bias: [c] or None.
        seq_idx: integer labels [b, l]; taps stop where the label changes.
        initial_state: inputs before the first token [b, c, k]; None: zeros.
        return_final_state: return the conv state after the last token too; taps that the last
            document may not see are zero in it.

    Returns:
        [b, l, c] in x's dtype; with `return_final_state` also the state [b, c, k] in x's dtype.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, length, channels = x.shape
    taps = weight.shape[1]
    before = x.new_zeros(batch, taps, channels)
    if initial_state is not None:
        before = initial_state.to(x.dtype).transpose(1, 2)
    padded = torch.cat([before, x], dim=1)
    documents = None
    if seq_idx is not None:
        # What lies before the first token belongs to the first document, number 0.
        documents = F.pad(number_documents(seq_idx), (taps, 0))

    out = padded.new_zeros(batch, length, channels, dtype=compute)
    for lag in range(taps):
        shifted = padded[:, taps - lag : taps - lag + length].to(compute)
        if documents is not None:
            same = documents[:, taps - lag : taps - lag + length] == documents[:, taps:]
            shifted = shifted.masked_fill(~same[..., None], 0.0)
        out = out + shifted * weight[:, taps - 1 - lag].to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    out = F.silu(out).to(x.dtype)
    if not return_final_state:
        return out
    final = padded[:, -taps:]
    if documents is not None:
        final = final.masked_fill((documents[:, -taps:] != documents[:, -1:])[..., None], 0.0)
    return out, final.transpose(1, 2).contiguous()


def causal_conv1d_after(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` after inputs `before` `[b, k - 1, c]`, as a part of a row has them."""
    # A state has one more, which no tap reaches.
    state = F.pad(before, (0, 0, 1, 0)).transpose(1, 2)
    found = causal_conv1d(x, weight, bias, seq_idx=seq_idx, initial_state=state)
    assert isinstance(found, Tensor)
    return found
