"""The selective scan token by token, differentiated by autograd: what the others are tested by.

Shapes: b batch, l tokens, d channels, n state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.segments import starts_of_documents


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written; arguments as in `selective_scan`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, channels = x.shape
    wide = [each.to(compute) for each in (x, dt, A, B, C, D, z, dt_bias)]
    x_c, dt_c, A_c, B_c, C_c, D_c, z_c, bias = wide
    steps = F.softplus(dt_c + bias, threshold=40.0)
    decay = torch.exp(steps[..., None] * A_c)
    if seq_idx is not None:
        decay = decay.masked_fill(starts_of_documents(seq_idx)[..., None, None], 0.0)
    state = x_c.new_zeros(batch, channels, A.shape[1])
    if initial_state is not None:
        state = initial_state.to(compute)
    outputs = []
    # unbind, because the backward of slicing in a loop is quadratic in the length.
    tokens = zip(*(t.unbind(1) for t in (decay, steps * x_c, B_c, C_c)), strict=True)
    for decay_t, input_t, B_t, C_t in tokens:
        state = decay_t * state + input_t[..., None] * B_t[:, None]
        outputs.append((state * C_t[:, None]).sum(-1))
    y = (torch.stack(outputs, dim=1) + D_c * x_c) * F.silu(z_c)
    return y.to(x.dtype), state
