"""The selective scan of Mamba-1, one signature over three implementations.

Shapes: b batch, l tokens, d channels, n state. Every channel has decay rates and a step size of its
own; B and C are the same for all. Source: Gu and Dao, "Mamba", 2023.
"""

from typing import Literal, get_args

from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.selective_scan.mamba_ssm import selective_scan_mamba_ssm
from megatron_hybrid.ops.selective_scan.reference import selective_scan_reference
from megatron_hybrid.ops.selective_scan.torch_chunked import selective_scan_torch

ScanBackend = Literal["reference", "torch", "mamba_ssm"]

_IMPLEMENTATIONS = {
    "reference": selective_scan_reference,
    "torch": selective_scan_torch,
    "mamba_ssm": selective_scan_mamba_ssm,
}
assert tuple(_IMPLEMENTATIONS) == get_args(ScanBackend)


def selective_scan(
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
    backend: ScanBackend = "torch",
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t and y_t = (S_t C_t + D x_t) silu(z_t).

    Args:
        x: inputs [b, l, d], l >= 1; it and other inputs may be transposed views of [l, b, .].
        dt: step sizes [b, l, d] before softplus(dt + dt_bias).
        A: decay rates [d, n], negative. D: skip [d]. dt_bias: [d]. Best in float32.
        B: input projections [b, l, n].
        C: output projections [b, l, n].
        z: the gate [b, l, d].
        seq_idx: integer labels [b, l]; S is reset where the label changes. None: one document.
        initial_state: S before the first token [b, d, n], or None for zeros; the first document
            of a row continues from it.
        backend: "reference" (sequential, for tests), "torch" (in chunks, any device) or
            "mamba_ssm" (CUDA).

    Returns:
        y [b, l, d] in x's dtype, and S after the last token [b, d, n], in float64 for float64 `x`,
        else float32.

    Raises:
        UserError: an unknown backend; shapes that do not fit; "mamba_ssm" without the package, or
            with an initial state, which it does not take.
    """
    if backend not in _IMPLEMENTATIONS:
        raise UserError(f"{backend=} is unknown; allowed: {', '.join(_IMPLEMENTATIONS)}")
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, seq_idx, initial_state)
    return _IMPLEMENTATIONS[backend](
        x, dt, A, B, C, D, z, dt_bias, seq_idx=seq_idx, initial_state=initial_state
    )


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    batch, length, channels = x.shape
    state = A.shape[1]
    wanted = {
        "dt": (dt, (batch, length, channels)),
        "A": (A, (channels, state)),
        "B": (B, (batch, length, state)),
        "C": (C, (batch, length, state)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "seq_idx": (seq_idx, (batch, length)),
        "initial_state": (initial_state, (batch, channels, state)),
    }
    problems = [
        f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} and state {state} it "
        f"must be {shape}"
        for name, (tensor, shape) in wanted.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if problems:
        raise UserError("; ".join(problems))
