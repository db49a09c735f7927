"""What a chunk of a sequence does to the state of a Mamba-2 core, without what it puts out.

The state after a chunk is `decay` times the one before it, plus `added`. Taken from the inputs by
one product of matrices a stretch of tokens, which is computed again in the backward: memory grows
by the inputs and one state a stretch, whatever the length.

Shapes: b batch, l tokens, h heads of p channels in g groups, d = h*p, n state, k taps,
c = d + 2*g*n convolved channels, of which the first e = d + g*n, x and B, go into states.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.causal_conv1d import causal_conv1d_after
from megatron_hybrid.ops.recompute import recomputed
from megatron_hybrid.ops.segments import number_documents

STRETCH = 1024


def mamba2_chunk_summary(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    before: Tensor,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How the state after the last token depends on that before the first one.

    Args:
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, head_dim, num_groups, before, seq_idx: as of
            `megatron_hybrid.ops.mamba2.mamba2_split_conv1d_scan`.

    Returns:
        decay [b, h], 0 where a document begins after the first token; added [b, h, p, n]: the state
        after the last token from an empty one. Both in float64 for float64 `zxbcdt`, else float32.
    """
    heads = len(A)
    into = zxbcdt.shape[-1] - heads - conv1d_weight.shape[0]  # where x begins: d
    used = into + (conv1d_weight.shape[0] - into) // 2  # x and B: e
    taps = conv1d_weight.shape[1]
    xB, dt = zxbcdt[..., into : into + used], zxbcdt[..., -heads:]
    documents = None if seq_idx is None else number_documents(seq_idx)
    compute = torch.float64 if zxbcdt.dtype == torch.float64 else torch.float32
    state_dim = (used - into) // num_groups
    state = zxbcdt.new_zeros(len(zxbcdt), heads, head_dim, state_dim, dtype=compute)
    decay = zxbcdt.new_ones(len(zxbcdt), heads, dtype=compute)
    parameters = (conv1d_weight[:used], conv1d_bias[:used], dt_bias, A)
    halo, last = before[..., :used], None if documents is None else documents[:, 0]
    first = 0
    # split, because the backward of slicing in a loop is quadratic in the length.
    for xB_part, dt_part in zip(xB.split(STRETCH, 1), dt.split(STRETCH, 1), strict=True):
        labels = None
        if documents is not None and last is not None:
            labels = documents[:, first : first + STRETCH]
            goes_on = labels[:, 0] == last
            decay, state = decay * goes_on[:, None], state * goes_on[:, None, None, None]
            last = labels[:, -1]
        stretch = partial(_stretch, labels=labels, shape=state.shape, groups=num_groups)
        through, added = recomputed(stretch, xB_part, dt_part, halo, *parameters)
        state = through[..., None, None] * state + added
        decay = decay * through
        halo, first = torch.cat([halo, xB_part], 1)[:, 1 - taps :], first + STRETCH
        if documents is not None and first < documents.shape[1]:
            same = documents[:, first - taps + 1 : first] == documents[:, first : first + 1]
            halo = halo * same[..., None]
    return decay, state


def _stretch(
    xB: Tensor,
    dt: Tensor,
    halo: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    labels: Tensor | None,
    shape: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """decay [b, h] and added [b, h, p, n] of a few tokens.

    Args:
        xB: [b, l, e]. dt: [b, l, h], before softplus. halo: [b, k - 1, e].
        labels: documents [b, l].
        shape: of `added`.
    """
    compute = torch.float64 if xB.dtype == torch.float64 else torch.float32
    xB, halo = xB.to(compute), halo.to(compute)
    convolved = causal_conv1d_after(xB, weight, bias, halo, seq_idx=labels)
    dt = F.softplus(dt.to(compute) + dt_bias.to(compute))
    # float64: a float32 sum over many tokens costs its differences much of their precision.
    logs = (dt.double() * A.double()).cumsum(1)
    through, to_end = logs[:, -1].exp(), (logs[:, -1:] - logs).exp()
    if labels is not None:
        to_end = to_end * (labels == labels[:, -1:])[..., None]
        through = through * (labels[:, :1] == labels[:, -1:])
    _, heads, head_dim, _ = shape
    x, B = convolved.split([heads * head_dim, convolved.shape[-1] - heads * head_dim], -1)
    x = x.unflatten(-1, (heads, head_dim)) * (dt * to_end.to(compute))[..., None]
    x = x.flatten(2).unflatten(-1, (groups, -1)).permute(0, 2, 3, 1)  # [b, g, r * p, l]
    B = B.unflatten(-1, (groups, -1)).transpose(1, 2)  # [b, g, l, n]
    return through.to(compute), (x @ B).reshape(shape)
