"""Layer by layer, the transformer_engine backend against torch's from the same weights."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from tests.gpu.layers import largest_error, line, outcome

# bf16 has 8 bits, and gradients pass several products of 256 and more terms.
TOLERANCE = 0.05
KINDS = ("M", "*", "-", "E")


@pytest.mark.parametrize("symbol", KINDS)
def test_bf16_on_the_cpu_is_within_the_tolerance(symbol: str, tmp_path: Path) -> None:
    """What the GPU test asks of Transformer Engine, the torch backend keeps in bf16."""
    weights = tmp_path / "weights.pt"
    exact = run_distributed(outcome, 1, line(symbol, "fp32", tmp_path), "torch", weights, save=True)
    got = run_distributed(outcome, 1, line(symbol, "bf16", tmp_path), "torch", weights, save=False)
    assert largest_error(got[0], exact[0]) < (TOLERANCE, "")


@pytest.mark.gpu
@pytest.mark.parametrize("symbol", KINDS)
def test_transformer_engine_equals_torch(symbol: str, tmp_path: Path) -> None:
    """Losses and all gradients of TE in bf16 on the GPU are those of fp32 on the CPU."""
    import torch.distributed as dist

    from megatron_hybrid.platform.backend import probe

    if probe().missing:
        pytest.skip(f"transformer_engine needs {', '.join(probe().missing)}")
    weights = tmp_path / "weights.pt"
    exact = run_distributed(outcome, 1, line(symbol, "fp32", tmp_path), "torch", weights, save=True)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        words = line(symbol, "bf16", tmp_path)
        got = outcome(words, "transformer_engine", weights, save=False)
    finally:
        dist.destroy_process_group()
    assert largest_error(got, exact[0]) < (TOLERANCE, "")
