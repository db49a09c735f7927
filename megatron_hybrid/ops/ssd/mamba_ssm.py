"""SSD by mamba-ssm's Triton kernels, for CUDA devices.

Shapes: b batch, l tokens, h heads, p head_dim, g groups, n state.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.segments import number_documents

CHUNK_TOKENS = 256


def load_kernel(name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The function `name` of mamba_ssm.ops.triton.ssd_combined.

    Raises:
        UserError: mamba-ssm, or something that it needs, is not installed.
    """
    try:
        module = import_module("mamba_ssm.ops.triton.ssd_combined")
    except ImportError as error:
        raise UserError(
            f"backend='mamba_ssm' needs the package mamba-ssm, which cannot be imported ({error}); "
            "install megatron-hybrid[gpu] on a machine with CUDA, or use backend='torch'"
        ) from error
    return getattr(module, name)


def ssd_mamba_ssm(
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
    """`mamba_chunk_scan_combined` behind the signature of `megatron_hybrid.ops.ssd.ssd`.

    Returns:
        y [b, l, h, p] in x's dtype and the final states [b, h, p, n].

    Raises:
        UserError: mamba-ssm is not installed.
    """
    kernel = load_kernel("mamba_chunk_scan_combined")
    # The kernel hands the initial state to the document numbered 0.
    documents = None if seq_idx is None else number_documents(seq_idx).to(torch.int32)
    y, final_states = kernel(
        x,
        dt,
        A,
        B,
        C,
        CHUNK_TOKENS,
        D=D,
        initial_states=initial_states,
        seq_idx=documents,
        return_final_states=True,
    )
    return y, final_states
