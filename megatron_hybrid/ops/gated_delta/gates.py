"""What stands around the gated delta rule: its decays, and the norm and gate after it.

Shapes: b batch, l tokens, h value heads of p channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decays_and_rates(
    alpha: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """g = -exp(A_log) softplus(alpha + dt_bias) and sigmoid(beta), in fp32 (float64 for float64).

    Args:
        alpha, beta: `[..., h]`.
        A_log, dt_bias: `[h]`.
    """
    compute = torch.float64 if alpha.dtype == torch.float64 else torch.float32
    steps = F.softplus(alpha.to(compute) + dt_bias.to(compute), threshold=40.0)
    return -A_log.to(compute).exp() * steps, beta.to(compute).sigmoid()


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head's channels, then the gate silu(z).

    Args:
        y, z: `[..., h, p]`.
        weight: `[p]`.

    Returns:
        `[..., h, p]` in y's dtype, computed in fp32 (float64 for float64).
    """
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    wide = y.to(compute)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(compute) * F.silu(z.to(compute))).to(y.dtype)
