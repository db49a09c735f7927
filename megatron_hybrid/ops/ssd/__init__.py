"""The state-space dual (SSD) scan of Mamba-2, one signature over three implementations.

Shapes: b batch, l tokens, h heads, p head_dim, g groups (head i reads group i // (h / g)), n state.
Source: Dao and Gu, "Transformers are SSMs", 2024.
"""

from typing import Literal, get_args

from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.ssd.mamba_ssm import ssd_mamba_ssm
from megatron_hybrid.ops.ssd.reference import ssd_reference
from megatron_hybrid.ops.ssd.torch_chunked import ssd_torch

SSDBackend = Literal["reference", "torch", "mamba_ssm"]

_IMPLEMENTATIONS = {
    "reference": ssd_reference,
    "torch": ssd_torch,
    "mamba_ssm": ssd_mamba_ssm,
}
assert tuple(_IMPLEMENTATIONS) == get_args(SSDBackend)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
    backend: SSDBackend = "torch",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T and y_t = S_t C_t + D x_t.

    Args:
        x: inputs [b, l, h, p], l >= 1.
        dt: step sizes [b, l, h], positive (after softplus and bias).
        A: decay rates [h], negative.
        B: input projections [b, l, g, n]; g divides h.
        C: output projections [b, l, g, n].
        D: skip [h], or None for no skip.
        initial_states: S before the first token [b, h, p, n], or None for zeros; the first
            document of a row continues from it.
        seq_idx: integer labels [b, l]; S is reset where the label changes. None: one document.
        return_final_states: return S after the last token too.
        backend: "reference" (sequential, any float dtype), "torch" (chunked, any device) or
            "mamba_ssm" (Triton, CUDA).

    Returns:
        y [b, l, h, p] in x's dtype; with `return_final_states` also S [b, h, p, n], in float64
        for float64 `x`, else float32 (mamba_ssm: in the dtype that it chooses).

    Raises:
        UserError: an unknown backend; "mamba_ssm" without the package; shapes that do not fit.
    """
    if backend not in _IMPLEMENTATIONS:
        raise UserError(f"{backend=} is unknown; allowed: {', '.join(_IMPLEMENTATIONS)}")
    _check_shapes(x, dt, A, B, C, D, initial_states, seq_idx)
    y, final_states = _IMPLEMENTATIONS[backend](
        x, dt, A, B, C, D=D, initial_states=initial_states, seq_idx=seq_idx
    )
    return (y, final_states) if return_final_states else y


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    batch, length, heads, head_dim = x.shape
    groups, state = B.shape[2:]
    wanted = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state)),
        "C": (C, (batch, length, groups, state)),
        "D": (D, (heads,)),
        "initial_states": (initial_states, (batch, heads, head_dim, state)),
        "seq_idx": (seq_idx, (batch, length)),
    }
    problems = [
        f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} it must be {shape}"
        for name, (tensor, shape) in wanted.items()
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    if heads % groups:
        problems.append(f"B has {groups} groups, which must divide the {heads} heads of x")
    if problems:
        raise UserError("; ".join(problems))
