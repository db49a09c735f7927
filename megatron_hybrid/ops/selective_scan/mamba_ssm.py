"""The selective scan by mamba-ssm's kernel, for CUDA devices.

Shapes: b batch, l tokens, d channels, n state; k tokens with those that end documents.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.segments import number_documents

# A step after which nothing is left of any state; exact in 16 bits.
ENDLESS = 2.0**100


def load_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """`selective_scan_fn` of mamba-ssm.

    Raises:
        UserError: mamba-ssm, or something that it needs, is not installed.
    """
    try:
        module = import_module("mamba_ssm.ops.selective_scan_interface")
    except ImportError as error:
        raise UserError(
            f"backend='mamba_ssm' needs the package mamba-ssm, which cannot be imported ({error}); "
            "install megatron-hybrid[gpu] on a machine with CUDA, or use backend='torch'"
        ) from error
    return module.selective_scan_fn


def selective_scan_mamba_ssm(
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
    """`selective_scan_fn` behind the signature of `selective_scan`.

    It knows no documents: one more token between two of them, of no input and an endless step,
    leaves nothing of the state.

    Raises:
        UserError: mamba-ssm is not installed; an initial state.
    """
    if initial_state is not None:
        raise UserError("backend='mamba_ssm' takes no initial_state; allowed: None, or 'torch'")
    kernel = load_kernel()
    place = length = None
    inputs = [x, dt, B, C, z]
    if seq_idx is not None:
        documents = number_documents(seq_idx).long()
        # [b, l]: where each token lies among those with the ones that end documents.
        place = torch.arange(documents.shape[1], device=x.device) + documents
        length = int(place[:, -1].max()) + 1
        inputs = [_spread(each, place, length) for each in inputs]
        inputs[1] = _with_ends(inputs[1], place)
    x_k, dt_k, B_k, C_k, z_k = (each.transpose(1, 2).contiguous() for each in inputs)
    y, state = kernel(
        x_k, dt_k, A.float(), B_k, C_k, D=D.float(), z=z_k, delta_bias=dt_bias.float(),
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    y = y.transpose(1, 2)
    if place is not None:
        y = y.gather(1, place[..., None].expand(-1, -1, y.shape[2]))
    return y, state


def _spread(tensor: Tensor, place: Tensor, length: int) -> Tensor:
    """[b, l, .] -> [b, k, .]: each token in its place, zeros elsewhere."""
    batch, _, width = tensor.shape
    wide = tensor.new_zeros(batch, length, width)
    return wide.scatter(1, place[..., None].expand(-1, -1, width), tensor)


def _with_ends(dt: Tensor, place: Tensor) -> Tensor:
    """dt [b, k, d] with an endless step after each document but the last, whose state stays."""
    ends = torch.ones(dt.shape[:2], dtype=torch.bool, device=dt.device).scatter(1, place, False)
    steps = torch.full_like(dt[..., 0], ENDLESS)
    after = torch.arange(dt.shape[1], device=dt.device) > place[:, -1:]
    return torch.where(ends[..., None], steps.masked_fill(after, -ENDLESS)[..., None], dt)
