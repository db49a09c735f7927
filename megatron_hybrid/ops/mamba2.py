"""The core of a Mamba-2 mixer between its two projections: convolution, SSD, gate and norm.

Shapes: b batch, l tokens, h heads of p channels, d = h*p, g groups, n state, k taps,
c = d + 2*g*n convolved channels. `zxbcdt` packs [z (d), x (d), B (g*n), C (g*n), dt (h)] in its
last dimension, as megatron-core's `in_proj` does.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.causal_conv1d import causal_conv1d_after
from megatron_hybrid.ops.gated_norm import rms_norm_grouped, silu_gate
from megatron_hybrid.ops.mamba2_fused import Norm, fused_core
from megatron_hybrid.ops.segments import number_documents
from megatron_hybrid.ops.ssd import SSDBackend, ssd
from megatron_hybrid.ops.ssd.buffers import DTypes, Sizes
from megatron_hybrid.ops.ssd.mamba_ssm import CHUNK_TOKENS, load_kernel


def mamba2_split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    seq_idx: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_group_size: int | None = None,
    norm_eps: float = 1e-5,
    before: Tensor | None = None,
    initial_states: Tensor | None = None,
    backend: SSDBackend = "torch",
) -> Tensor:
    """norm(silu(z) * (SSD(silu(conv(x, B, C)), softplus(dt + dt_bias)) + D x)), for training.

    Args:
        zxbcdt: [b, l, 2d + 2gn + h]; may be a transposed view of [l, b, .], which is not copied.
        conv1d_weight: [c, k], the last tap on the token itself. conv1d_bias: [c].
        dt_bias: [h]. A: [h], negative. D: [h]. Best in float32: they decide how states decay.
        head_dim: p.
        num_groups: g; head i reads group i // (h / g) of B and C.
        seq_idx: integer labels [b, l]; states and taps start anew where the label changes.
        norm_weight: [d] for a grouped RMSNorm after the gate; None: no norm.
        norm_group_size: channels that share a mean square; needed with `norm_weight`.
        norm_eps: added to the mean square.
        before: inputs of the convolution before the first token [b, k - 1, c]; None: zeros. They
            are of the first document of their row, as `initial_states` are.
        initial_states: of the scan before the first token [b, h, p, n]; None: zeros.
        backend: "torch" (one autograd function, blocks in the cache), "reference" (a composition
            of the plain operations, for tests) or "mamba_ssm" (Triton, CUDA).

    Returns:
        [b, l, d] in zxbcdt's dtype. "torch" and "reference" compute in float64 for float64, else
        in float32; for bfloat16 the GEMMs of "torch" take bfloat16 operands where the device
        multiplies those.

    Raises:
        UserError: shapes that do not fit; an unknown backend; "mamba_ssm" without the package, or
            with what comes before the first token.

    Source: the counterpart of mamba-ssm's `mamba_split_conv1d_scan_combined`.
    """
    sizes = _sizes(zxbcdt, conv1d_weight, A, head_dim, num_groups)
    norm = _norm(sizes, norm_weight, norm_group_size, norm_eps)
    parameters = (conv1d_weight, conv1d_bias, dt_bias, A, D)
    starts = (before, initial_states)
    if backend == "torch":
        return fused_core(zxbcdt, *parameters, norm_weight, sizes, norm, seq_idx, *starts)
    if backend == "mamba_ssm":
        if before is not None or initial_states is not None:
            raise UserError("backend='mamba_ssm' takes no before and no initial_states; "
                            "allowed: None, or 'torch'")  # fmt: skip
        y = _mamba_ssm(zxbcdt, *parameters, sizes, seq_idx)
    else:
        y = _composed(zxbcdt, *parameters, sizes, seq_idx, *starts, backend)
    if norm is None or norm_weight is None:
        return y
    return rms_norm_grouped(y, norm_weight, norm.group_size, norm.eps)


def _composed(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    sizes: Sizes,
    seq_idx: Tensor | None,
    before: Tensor | None,
    initial_states: Tensor | None,
    backend: SSDBackend,
) -> Tensor:
    """The core without the norm from the operations of this package, each with its own autograd."""
    compute = DTypes.of(zxbcdt).compute
    z, xbc, dt = _split(zxbcdt, sizes)
    if before is None:
        before = zxbcdt.new_zeros(len(zxbcdt), conv1d_weight.shape[1] - 1, sizes.all_channels)
    convolved = causal_conv1d_after(xbc, conv1d_weight, conv1d_bias, before, seq_idx=seq_idx)
    x, B, C = sizes.split(convolved)
    dt = F.softplus(dt.to(compute) + dt_bias.to(compute))
    y = ssd(x, dt, A, B, C, D=D, seq_idx=seq_idx, initial_states=initial_states, backend=backend)
    assert isinstance(y, Tensor)
    return silu_gate(y.flatten(-2), z)


def _mamba_ssm(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    sizes: Sizes,
    seq_idx: Tensor | None,
) -> Tensor:
    """The core without the norm by mamba-ssm's fused kernel."""
    kernel = load_kernel("mamba_split_conv1d_scan_combined")
    y = kernel(
        zxbcdt.contiguous(),
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D=D,
        chunk_size=CHUNK_TOKENS,
        seq_idx=None if seq_idx is None else number_documents(seq_idx),
        activation="silu",
        headdim=sizes.head_dim,
        ngroups=sizes.groups,
        norm_before_gate=False,
    )
    assert isinstance(y, Tensor)
    return y


def _sizes(
    zxbcdt: Tensor, conv1d_weight: Tensor, A: Tensor, head_dim: int, num_groups: int
) -> Sizes:
    """Sizes by the parameters' shapes, held against the width of `zxbcdt`."""
    heads, channels = A.shape[0], A.shape[0] * head_dim
    projected = conv1d_weight.shape[0] - channels
    problems = []
    if heads % num_groups:
        problems.append(f"{num_groups=} must divide the {heads} heads of A")
    if projected <= 0 or projected % (2 * num_groups):
        problems.append(
            f"conv1d_weight has {conv1d_weight.shape[0]} channels; with {heads} heads of "
            f"{head_dim=} it must have {channels} + 2 * {num_groups=} * state"
        )
    width = channels + conv1d_weight.shape[0] + heads
    if zxbcdt.shape[-1] != width:
        problems.append(
            f"zxbcdt has width {zxbcdt.shape[-1]}; with {heads} heads of {head_dim=} and "
            f"{conv1d_weight.shape[0]} convolved channels it must be {width}"
        )
    if problems:
        raise UserError("; ".join(problems))
    return Sizes(heads, head_dim, num_groups, projected // (2 * num_groups))


def _norm(sizes: Sizes, weight: Tensor | None, group_size: int | None, eps: float) -> Norm | None:
    if weight is None:
        return None
    if not group_size or sizes.channels % group_size:
        raise UserError(
            f"norm_group_size={group_size} must divide the {sizes.channels} channels of y"
        )
    return Norm(group_size, eps)


def _split(zxbcdt: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Views z [..., d], xBC [..., c] and dt [..., h]."""
    z, xbc, dt = zxbcdt.split([sizes.channels, sizes.all_channels, sizes.heads], dim=-1)
    return z, xbc, dt
