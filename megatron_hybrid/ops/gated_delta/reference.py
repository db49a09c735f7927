"""The gated delta rule token by token, differentiated by autograd: what the others are tested by.

Shapes: b batch, l tokens, k key heads of n channels, h value heads of p channels.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops.segments import starts_of_documents

LENGTH_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """`[..., n]` of length one; what is near zero stays small."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)


def gated_delta_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written; arguments as in `gated_delta_rule`."""
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    q_c, k_c, v_c, g_c, beta_c = (each.to(compute) for each in (q, k, v, g, beta))
    batch, _, heads, channels = v.shape
    served, state_dim = heads // k.shape[2], k.shape[3]
    q_c = (unit(q_c) / state_dim**0.5).repeat_interleave(served, dim=2)
    k_c = unit(k_c).repeat_interleave(served, dim=2)
    decay = g_c.exp()
    if seq_idx is not None:
        decay = decay.masked_fill(starts_of_documents(seq_idx)[..., None], 0.0)
    state = v_c.new_zeros(batch, heads, state_dim, channels)
    if initial_state is not None:
        state = initial_state.to(compute)
    outputs = []
    # unbind, because the backward of slicing in a loop is quadratic in the length.
    tokens = zip(*(t.unbind(1) for t in (q_c, k_c, v_c, decay, beta_c)), strict=True)
    for q_t, k_t, v_t, decay_t, beta_t in tokens:
        state = decay_t[..., None, None] * state
        said = (state * k_t[..., None]).sum(-2)
        change = beta_t[..., None] * (v_t - said)
        state = state + k_t[..., None] * change[..., None, :]
        outputs.append((state * q_t[..., None]).sum(-2))
    return torch.stack(outputs, dim=1).to(v.dtype), state
