"""Fixtures shared by the tests of the operations."""

from collections.abc import Iterator

import pytest
import torch

from megatron_hybrid.ops.ssd import buffers


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` and its like hand out NaN, and no workspace is left from an earlier call."""
    monkeypatch.setattr(buffers, "WORKSPACE", buffers.Workspace())
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
