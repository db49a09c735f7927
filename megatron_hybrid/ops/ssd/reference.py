"""SSD as the plain recurrence over tokens: slow, any float dtype, the oracle of every other one.

Shapes: b batch, l tokens, h heads, p head_dim, g groups (head i reads group i // (h / g)), n state.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops.segments import starts_of_documents


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t, one token at a time.

    Computes in float64 for float64 `x`, else in float32; `autograd` differentiates it in linear
    time. Arguments as in `megatron_hybrid.ops.ssd.ssd`.

    Returns:
        y [b, l, h, p] in x's dtype and the final states [b, h, p, n] in the computing dtype.
    """
    batch, _, heads, head_dim = x.shape
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads_a_group = heads // B.shape[2]
    state = x.new_zeros(batch, heads, head_dim, B.shape[3], dtype=compute)
    if initial_states is not None:
        state = state + initial_states.to(compute)

    dt = dt.to(compute)
    decay = torch.exp(dt * A.to(compute))
    if seq_idx is not None:
        # A document's first token forgets what came before; the first document's keeps the
        # initial state.
        decay = decay.masked_fill(starts_of_documents(seq_idx)[..., None], 0.0)
    inputs = x.to(compute) * dt[..., None]
    B_of_head = B.to(compute).repeat_interleave(heads_a_group, dim=2)
    C_of_head = C.to(compute).repeat_interleave(heads_a_group, dim=2)

    outputs = []
    # unbind, because the backward of slicing in a loop is quadratic in the length.
    steps = zip(*(t.unbind(1) for t in (decay, inputs, B_of_head, C_of_head)), strict=True)
    for decay_t, input_t, B_t, C_t in steps:
        state = decay_t[..., None, None] * state + input_t[..., None] * B_t[..., None, :]
        outputs.append((state * C_t[..., None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(compute)[:, None] * x.to(compute)
    return y.to(x.dtype), state
