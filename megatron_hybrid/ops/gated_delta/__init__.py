"""The gated delta rule, one signature over its implementations.

Shapes: b batch, l tokens, k key heads of n channels, h value heads of p channels; h is a multiple
of k, and each key head serves h / k value heads in a row. Source: Yang, Kautz and Hatamizadeh,
"Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.gated_delta.reference import gated_delta_reference
from megatron_hybrid.ops.gated_delta.torch_chunked import gated_delta_step, gated_delta_torch

DeltaBackend = Literal["reference", "torch"]

__all__ = ["DeltaBackend", "gated_delta_rule", "gated_delta_step", "gated_delta_summary"]

_IMPLEMENTATIONS = {"reference": gated_delta_reference, "torch": gated_delta_torch}
assert tuple(_IMPLEMENTATIONS) == get_args(DeltaBackend)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: DeltaBackend = "torch",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}' k_t)' and y_t = S_t' q_t.

    Args:
        q, k: `[b, l, k, n]`; each head's vector is brought to length one, and q then divided by
            sqrt(n).
        v: `[b, l, h, p]`.
        g: `[b, l, h]`, logarithm of the decay, not above 0. Best in float32.
        beta: `[b, l, h]`, how much of what the state says of k is replaced, 0 to 1.
        seq_idx: integer labels `[b, l]`; S is reset where the label changes. None: one document.
        initial_state: S before the first token `[b, h, n, p]`, or None for zeros; the first
            document of a row continues from it.
        backend: "reference" (sequential, for tests) or "torch" (in chunks, any device).

    Returns:
        y `[b, l, h, p]` in v's dtype, and S after the last token `[b, h, n, p]`, in float64 for
        float64 `v`, else float32.

    Raises:
        UserError: an unknown backend, or shapes that do not fit.
    """
    if backend not in _IMPLEMENTATIONS:
        raise UserError(f"{backend=} is unknown; allowed: {', '.join(_IMPLEMENTATIONS)}")
    _check_shapes(q, k, v, g, beta, seq_idx, initial_state)
    return _IMPLEMENTATIONS[backend](q, k, v, g, beta, seq_idx=seq_idx, initial_state=initial_state)


def gated_delta_summary(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How the state after the last token depends on that before the first one: transfer @ it +
    added. Arguments as of `gated_delta_rule`.

    Returns:
        transfer `[b, h, n, n]`, 0 where a document begins after the first token, and added
        `[b, h, n, p]`, in the computing dtype.
    """
    (*rows, heads, channels), state = v.shape, k.shape[-1]
    # Columns of a state know nothing of one another: of no values, they are what is left of it.
    values = torch.cat([v, v.new_zeros(*rows, heads, state)], dim=-1)
    before = v.new_zeros(rows[0], heads, state, channels + state, dtype=_computing(v))
    before[..., channels:] = torch.eye(state, dtype=before.dtype, device=v.device)
    _, after = gated_delta_rule(q, k, values, g, beta, seq_idx=seq_idx, initial_state=before)
    added, transfer = after.split([channels, state], dim=-1)
    return transfer, added


def _computing(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    batch, length, heads, channels = v.shape
    key_heads, state = k.shape[-2:]
    wanted = {
        "q": (q, (batch, length, key_heads, state)),
        "k": (k, (batch, length, key_heads, state)),
        "g": (g, (batch, length, heads)),
        "beta": (beta, (batch, length, heads)),
        "seq_idx": (seq_idx, (batch, length)),
        "initial_state": (initial_state, (batch, heads, state, channels)),
    }
    problems = [
        f"{name} has shape {tuple(tensor.shape)}; with v {tuple(v.shape)} it must be {shape}"
        for name, (tensor, shape) in wanted.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if heads % key_heads:
        problems.append(f"the {heads} heads of v must be a multiple of the {key_heads} heads of k")
    if problems:
        raise UserError("; ".join(problems))
