"""The gated delta rule in chunks, by products of matrices.

Within a chunk the tokens' changes to the state depend on one another through a triangular system
(the UT transform): its inverse gives what each would write into an empty state (u), and what it
takes back of the state before the chunk (w). The chunks then follow one another.

A stretch of chunks is computed again in the backward, from the state before it: memory grows by
the inputs and one state a stretch, whatever the length.

Shapes: b batch, l tokens, k key heads of n channels, r value heads a key head, p channels of each;
m chunks of c tokens.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.ops.gated_delta.reference import unit
from megatron_hybrid.ops.recompute import recomputed
from megatron_hybrid.ops.segments import starts_of_documents

CHUNK = 64
STRETCH = 16 * CHUNK


def gated_delta_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `gated_delta_rule`, in chunks of 64 tokens."""
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, _, heads, channels = v.shape
    key_heads, state_dim = k.shape[2:]
    g = g.to(compute)
    if seq_idx is not None:
        # Nothing decays across: all sums that a document's start is in are minus infinity.
        g = g.masked_fill(starts_of_documents(seq_idx)[..., None], -torch.inf)
    if initial_state is None:
        state = v.new_zeros(
            batch, key_heads, heads // key_heads, state_dim, channels, dtype=compute
        )
    else:
        state = initial_state.to(compute).unflatten(1, (key_heads, -1))
    outputs = []
    # split, because the backward of slicing in a loop is quadratic in the length.
    for parts in zip(*(each.split(STRETCH, dim=1) for each in (q, k, v, g, beta)), strict=True):
        y, state = recomputed(_stretch, *parts, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state.flatten(1, 2)


def _stretch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y `[b, l, h, p]` of some tokens, and the state `[b, k, r, n, p]` after them."""
    compute, length = state.dtype, v.shape[1]
    groups = (k.shape[2], -1)
    # Tokens that fill the last chunk up change nothing: they have no key, no beta and no decay.
    q_m, k_m = (_chunks(unit(each.to(compute))) for each in (q, k))  # [b, k, m, c, n]
    q_m = q_m / k.shape[3] ** 0.5
    v_m = _chunks(v.to(compute)).unflatten(1, groups)  # [b, k, r, m, c, p]
    g_m, beta_m = (
        _chunks(each.to(compute)[..., None]).unflatten(1, groups)[..., 0] for each in (g, beta)
    )  # [b, k, r, m, c]
    decays = _decays(g_m)  # [b, k, r, m, c, c]
    from_start = g_m.cumsum(-1).exp()[..., None]
    keys = k_m.transpose(-1, -2)
    system = beta_m[..., None] * (k_m @ keys).unsqueeze(2) * decays
    k_m, q_m = k_m.unsqueeze(2), q_m.unsqueeze(2)
    scale = beta_m[..., None]
    asked = torch.cat([scale * v_m, scale * from_start * k_m], dim=-1)
    solved = _UnitInverse.apply(system) @ asked
    seen = (q_m @ k_m.transpose(-1, -2)) * decays
    reading, kept = q_m * from_start, k_m * decays[..., -1, :, None]
    lasting = from_start[..., -1:, :]
    outputs = []
    of_chunks = (*solved.split([v.shape[-1], k.shape[-1]], -1), seen, reading, kept, lasting)
    for u, w, seen_c, reading_c, kept_c, lasting_c in zip(
        *(each.unbind(3) for each in of_chunks), strict=True
    ):
        change = u - w @ state
        outputs.append(reading_c @ state + seen_c @ change)
        state = lasting_c * state + kept_c.transpose(-1, -2) @ change
    y = torch.stack(outputs, dim=3).flatten(3, 4).flatten(1, 2)  # [b, h, l, p]
    return y[:, :, :length].transpose(1, 2).to(v.dtype), state


class _UnitInverse(torch.autograd.Function):
    """The inverse of I plus what is below the diagonal of `[..., c, c]`.

    Solving for a chunk's n + p columns themselves takes longer, and a second solve backward.
    """

    @staticmethod
    def forward(ctx: Any, system: Tensor) -> Tensor:
        ones = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(
            system, ones.expand_as(system), upper=False, unitriangular=True
        )
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return (transposed @ grad @ transposed).tril_(-1).neg_()


def _chunks(x: Tensor) -> Tensor:
    """`[b, l, h, d]` -> `[b, h, m, c, d]`, the last chunk filled up with zeros."""
    missing = -x.shape[1] % CHUNK
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.transpose(1, 2).unflatten(2, (-1, CHUNK))


def _decays(g: Tensor) -> Tensor:
    """`[..., c]` -> `[..., c, c]`: exp(g_{j+1} + ... + g_i) at (i, j), 0 above the diagonal.

    Summed anew from each j: a difference of sums would lose what is small beside a large g before
    it, and be NaN behind a document's start.
    """
    size = g.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    sums = g[..., None].masked_fill(~below, 0.0).cumsum(-2)
    return sums.exp().tril()


def gated_delta_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> Tensor:
    """One token of each of b sequences; changes `state`.

    Args:
        state: `[b, h, n, p]`.
        q, k: `[b, k, n]`.
        v: `[b, h, p]`. g, beta: `[b, h]`.

    Returns:
        y `[b, h, p]`, in v's dtype.
    """
    served, compute = v.shape[1] // k.shape[1], state.dtype
    q, k = (unit(each.to(compute)).repeat_interleave(served, dim=1) for each in (q, k))
    state.mul_(g.to(compute).exp()[..., None, None])
    said = torch.matmul(k[..., None, :], state)[..., 0, :]
    change = beta.to(compute)[..., None] * (v.to(compute) - said)
    state.add_(k[..., None] * change[..., None, :])
    y = torch.matmul(q[..., None, :] / q.shape[-1] ** 0.5, state)[..., 0, :]
    return y.to(v.dtype)
