r"""mamba-ssm's Triton kernels, interpreted on the CPU, against our recurrence in float64.

    MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
        CAUSAL_CONV1D_FORCE_BUILD=TRUE python -m pip install --no-deps --no-build-isolation \
        --constraint docker/constraints.txt --target FOLDER mamba-ssm causal-conv1d
    python -m tests.gpu_on_cpu.kernels_interpreted FOLDER [part of a case's name]

Takes a minute or two, so that no test does it. Exits with 1 if a case is further off than it may.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tests.gpu_on_cpu import interpreter

# In place of 256, so that a few tokens are in several chunks.
CHUNK_TOKENS = 32
# In bf16 mamba-ssm is least exact in the gradient of dt_bias, to some 2 %.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}


class Case(NamedTuple):
    """A mixer's call: heads of `channels` in groups of `state`; `packed`: two documents a row."""

    dtype: torch.dtype
    tokens: int = 40
    packed: bool = False
    heads: int = 4
    groups: int = 2
    channels: int = 16
    state: int = 16


CASES = {
    "fp32, a chunk and a part": Case(torch.float32),
    "fp32, packed, three chunks": Case(torch.float32, tokens=75, packed=True),
    "fp32, one group, odd width": Case(torch.float32, tokens=20, heads=3, groups=1),
    "bf16, a chunk and a part": Case(torch.bfloat16),
    "bf16, packed": Case(torch.bfloat16, packed=True),
}


def arguments(case: Case) -> dict[str, Tensor]:
    """As a mixer has them: the projection a transposed view, what decides of decay in fp32."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inner = case.heads * case.channels
    convolved = inner + 2 * case.groups * case.state
    low = {
        "zxbcdt": normal(case.tokens, 2, inner + convolved + case.heads),
        "conv1d_weight": normal(convolved, 4) / 2,
        "conv1d_bias": normal(convolved) / 2,
        "norm_weight": normal(inner),
    }
    exact = {
        "dt_bias": normal(case.heads) - 4,
        "A": -normal(case.heads).exp(),
        "D": normal(case.heads),
    }
    return {name: tensor.to(case.dtype) for name, tensor in low.items()} | exact


def outcome(case: Case, backend: str) -> dict[str, Tensor]:
    """The output and all gradients, in float64; "reference" computes in float64 as well."""
    from megatron_hybrid.ops import mamba2

    mamba2.CHUNK_TOKENS = CHUNK_TOKENS
    leaves = arguments(case)
    if backend == "reference":
        leaves = {name: tensor.double() for name, tensor in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    seq_idx = None
    if case.packed:
        seq_idx = (torch.arange(case.tokens) >= case.tokens // 3).long().expand(2, -1)
    y = mamba2.mamba2_split_conv1d_scan(
        **leaves | {"zxbcdt": leaves["zxbcdt"].transpose(0, 1)}, head_dim=case.channels,
        num_groups=case.groups, seq_idx=seq_idx, backend=backend,
        norm_group_size=case.heads * case.channels // case.groups,
    )  # fmt: skip
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    found = {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.double() for name, tensor in found.items()}


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    interpreter.install(Path(sys.argv[1]))
    from tests.gpu.layers import largest_error

    failed = False
    for name, case in CASES.items():
        if not all(word in name for word in sys.argv[2:]):
            continue
        started = time.monotonic()
        error, where = largest_error(outcome(case, "mamba_ssm"), outcome(case, "reference"))
        bound = TOLERANCES[case.dtype]
        failed |= not error < bound
        seconds = time.monotonic() - started
        print(f"{name}: {error:.1e} in {where}, allowed {bound:.0e} ({seconds:.0f} s)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
