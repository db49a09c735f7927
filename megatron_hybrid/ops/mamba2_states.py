"""The core of a Mamba-2 mixer with states: parts of a text in turn, then a token of many texts.

Shapes: b sequences, l tokens, h heads of p channels in g groups of r = h / g, n state, k taps,
d = h*p, c = d + 2*g*n convolved channels. A sequence's states are its last k - 1 inputs of the
convolution, `[k - 1, c]`, and `[g, n, r*p]` of the scan: the channels innermost, so that what a
token reads, a row times a matrix, and what it adds, goes through memory in order. Both are in the
computing dtype: float64 for float64 inputs, else float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.ops.gated_norm import inverse_rms
from megatron_hybrid.ops.mamba2_fused import Core, Inputs, Norm
from megatron_hybrid.ops.ssd.buffers import WORKSPACE, Sizes


class CoreParameters(NamedTuple):
    """Of one mixer, in the computing dtype: conv_weight `[k, c]`, conv_bias `[c]`; dt_bias
    `[h]`, A (negative) and D `[h, 1]`; norm_weight `[d]`, of groups of `norm.group_size`,
    or None."""

    sizes: Sizes
    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor | None
    norm: Norm | None


def empty_states(
    parameters: CoreParameters, sequences: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """States before the first token: `[sequences, k - 1, c]` and `[sequences, g, n, r*p]`."""
    sizes, (taps, channels) = parameters.sizes, parameters.conv_weight.shape
    width = sizes.heads_a_group * sizes.head_dim
    device = parameters.A.device
    return (
        torch.zeros(sequences, taps - 1, channels, dtype=dtype, device=device),
        torch.zeros(sequences, sizes.groups, sizes.state, width, dtype=dtype, device=device),
    )


@torch.no_grad()
def mamba2_chunk(
    zxbcdt: Tensor,
    parameters: CoreParameters,
    conv_state: Tensor,
    ssm_states: Sequence[Tensor],
) -> Tensor:
    """A part of b texts after what their states hold; the states move on in place.

    Args:
        zxbcdt: `[b, l, 2d + 2gn + h]`, as for `mamba2_split_conv1d_scan`.
        conv_state: `[b, k - 1, c]`.
        ssm_states: `[g, n, r*p]` each.

    Returns:
        `[b, l, d]` in zxbcdt's dtype: what a forward over all so far has at these tokens.
    """
    sizes, length = parameters.sizes, zxbcdt.shape[1]
    inputs = Inputs(
        zxbcdt, parameters.conv_weight.t(), parameters.conv_bias, parameters.dt_bias,
        parameters.A.squeeze(1), parameters.D.squeeze(1), parameters.norm_weight, None,
    )  # fmt: skip
    core = Core(inputs, sizes, parameters.norm, before=conv_state)
    y = zxbcdt.new_empty(*zxbcdt.shape[:2], sizes.channels)
    by_head = (sizes.groups, sizes.state, sizes.heads_a_group, sizes.head_dim)
    for row, state in enumerate(ssm_states):
        state = state.view(by_head).permute(0, 2, 3, 1)  # [g, r, p, n]
        carry = state.flatten(0, 1).contiguous()
        for block in core.scan.blocks(row):
            core.forward(block, carry, block.buffers.states, y[row, block.tokens])
        state.copy_(carry.view(state.shape))
    kept = conv_state.shape[1]
    if length < kept:
        conv_state[:, :-length] = conv_state[:, length:].clone()
    conv_state[:, -length:] = core.xbc[:, -kept:]
    return y


class Mamba2Step:
    """One token more of each of b texts, with views that are made once, of buffers that all share.

    Args:
        conv_state: `[b, k - 1, c]`. ssm_state: `[b, g, n, r*p]`, contiguous. Both move on in place
            at each call.
        eps: of the norm.
    """

    def __init__(
        self, sizes: Sizes, conv_state: Tensor, ssm_state: Tensor, eps: float = 1e-5
    ) -> None:
        batch, groups, state, width = ssm_state.shape
        self.sizes, self.conv_state = sizes, conv_state
        projected = sizes.groups * sizes.state
        self.parts = [sizes.channels, sizes.all_channels, sizes.heads]
        self.conv_parts = [sizes.channels, projected, projected]
        self.ssm_state = ssm_state.view(batch * groups, state, width)
        # What the states are multiplied with, what is added to them, and what they give.
        self.decay, self.added, self.y = (
            WORKSPACE.get(name, ssm_state.dtype, ssm_state.device, (batch * groups, 1, width))
            for name in ("step_decay", "step_added", "step_y")
        )
        self.decay_by_head, self.added_by_head, self.y_by_head = (
            each.view(batch, sizes.heads, sizes.head_dim)
            for each in (self.decay, self.added, self.y)
        )
        self.eps = ssm_state.new_tensor(eps)
        self.y_flat = self.y.view(batch, sizes.channels)

    def __call__(self, zxbcdt: Tensor, parameters: CoreParameters) -> Tensor:
        """`[b, 2d + 2gn + h]` -> `[b, d]` in its dtype; a view of the buffer for float32."""
        _, conv_weight, conv_bias, dt_bias, A, D, norm_weight, norm = parameters
        sizes, compute = self.sizes, self.y.dtype
        wide = zxbcdt if zxbcdt.dtype == compute else zxbcdt.to(compute)
        z, xbc, dt = torch.split_with_sizes(wide, self.parts, -1)
        window = torch.cat((self.conv_state, xbc.unsqueeze(1)), 1)
        self.conv_state.copy_(window[:, 1:])
        xbc = F.silu(window.mul_(conv_weight).sum(1).add_(conv_bias), inplace=True)
        x, B, C = torch.split_with_sizes(xbc, self.conv_parts, -1)
        x = x.view(self.y_by_head.shape)

        dt = F.softplus(dt + dt_bias).unsqueeze(-1)
        torch.mul(x, dt, out=self.added_by_head)
        self.decay_by_head.copy_(dt.mul_(A).exp_())
        self.ssm_state.mul_(self.decay)
        self.ssm_state.addcmul_(B.reshape(-1, sizes.state, 1), self.added)
        torch.bmm(C.reshape(-1, 1, sizes.state), self.ssm_state, out=self.y)
        self.y_by_head.addcmul_(x, D)

        y = self.y_flat.mul_(F.silu(z))
        if norm is not None and norm_weight is not None:
            grouped = y.view(y.shape[0], -1, norm.group_size)
            grouped.mul_(inverse_rms(grouped, self.eps))
            y.mul_(norm_weight)
        return y if wide is zxbcdt else y.to(zxbcdt.dtype)
