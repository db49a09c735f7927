"""mamba-ssm's and causal-conv1d's kernels against our references in float64."""

import pytest
import torch

from tests.gpu.kernels import TOLERANCE, run
from tests.gpu.layers import largest_error


@pytest.mark.parametrize("packed", [False, True])
def test_fused_torch_kernel(packed: bool) -> None:
    """The comparison itself, with torch's kernel on the CPU in fp32."""
    want = run(65, "cpu", torch.float64, "reference", packed)
    got = run(65, "cpu", torch.float32, "torch", packed)
    assert largest_error(got, want) < (1e-4, "")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [64, 504])
def test_fused_triton_kernel(length: int, packed: bool) -> None:
    """Convolution, scan and gate of mamba-ssm, forward and every gradient."""
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
    want = run(length, "cpu", torch.float64, "reference", packed)
    got = run(length, "cuda", torch.float32, "mamba_ssm", packed)
    assert largest_error(got, want) < (TOLERANCE, "")
