"""Layer by layer, the transformer_engine backend against torch's from the same weights."""

from pathlib import Path

import pytest

from megatron_hybrid.testing import run_distributed
from tests.gpu.layers import (
    KINDS,
    TOLERANCE,
    largest_error,
    line,
    outcome,
    transformer_engine_error,
)


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
    from megatron_hybrid.platform.backend import probe

    if probe().missing:
        pytest.skip(f"transformer_engine needs {', '.join(probe().missing)}")
    assert transformer_engine_error(symbol, tmp_path) < (TOLERANCE, "")
