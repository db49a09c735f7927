"""Fixtures shared by the tests of the operations."""

from collections.abc import Iterator

import pytest
import torch

from megatron_hybrid.ops import bf16
from megatron_hybrid.ops.ssd import block, buffers


@pytest.fixture(scope="session", autouse=True)
def small_blocks() -> Iterator[None]:
    """Two chunks of the tests' small tensors a block, so that 500 tokens are several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "BLOCK_ELEMENTS_A_THREAD", 2 * 64 * 32)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` and its like hand out NaN, and no workspace is left from an earlier call."""
    monkeypatch.setattr(buffers, "WORKSPACE", buffers.Workspace())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["as they are", "through fp32"])
def bf16_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test both ways of multiplying bf16, whatever this processor would choose."""
    monkeypatch.setattr(bf16, "_choose_fp32", lambda: request.param == "through fp32")
    return request.param
