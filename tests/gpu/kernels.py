"""The core of a Mamba-2 mixer on a device against our reference in float64 on the CPU."""

import torch

# The kernels multiply fp32 on TF32 units (10 bits).
TOLERANCE = 5e-3


def case(length: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Arguments of `mamba2_split_conv1d_scan`: 4 heads of 32 channels, 2 groups of 16 states."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "zxbcdt": normal(2, length, 128 + 128 + 64 + 4),
        "conv1d_weight": normal(192, 4) / 2,
        "conv1d_bias": normal(192) / 2,
        "dt_bias": normal(4) - 4,
        "A": -normal(4).exp(),
        "D": normal(4),
    }
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}


def run(
    length: int, device: str, dtype: torch.dtype, backend: str, packed: bool
) -> dict[str, torch.Tensor]:
    """The output `[2, length, 128]` and each argument's gradient, in float64 on the CPU."""
    from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan

    arguments = case(length, device, dtype)
    seq_idx = None
    if packed:
        boundary = torch.arange(length, device=device) >= length // 3
        seq_idx = boundary.to(torch.int32).expand(2, -1)
    y = mamba2_split_conv1d_scan(
        **arguments,
        head_dim=32,
        num_groups=2,
        seq_idx=seq_idx,
        backend=backend,  # type: ignore[arg-type]
    )
    weights = torch.linspace(-1, 1, y.numel(), device=device, dtype=dtype).view(y.shape)
    (y * weights).sum().backward()
    found = {name: tensor.grad for name, tensor in arguments.items()}
    return {
        name: tensor.detach().double().cpu()
        for name, tensor in {"y": y, **found}.items()
        if tensor is not None
    }
