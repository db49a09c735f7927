"""How a processor multiplies bf16: what is asked, chosen and told."""

import logging
import platform
from pathlib import Path

import pytest
import torch

from megatron_hybrid.ops import bf16

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(
    not CPUINFO.exists() or platform.machine() != "x86_64",
    reason="needs Linux's list of an x86 processor's instructions",
)
def test_processor_is_known_by_its_instructions() -> None:
    """bf16 instructions mean bf16 products; neither they nor AVX-512 mean none."""
    flags = set(CPUINFO.read_text(encoding="utf-8").split("flags", 1)[1].splitlines()[0].split())
    if flags & {"avx512_bf16", "amx_bf16"}:
        assert bf16.cpu_multiplies_bf16()
    elif not flags & {"avx512bw", "avx_ne_convert"}:
        assert not bf16.cpu_multiplies_bf16()


@pytest.mark.parametrize("instructions", [True, False])
def test_choice_is_told_once(
    instructions: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """fp32 is chosen for bf16 on a processor without instructions, and said so in one line."""
    monkeypatch.setattr(bf16, "cpu_multiplies_bf16", lambda: instructions)
    bf16._choose_fp32.cache_clear()
    caplog.set_level(logging.INFO, logger=bf16.__name__)
    tensor = torch.ones(1)
    try:
        assert not bf16.through_fp32(tensor)
        assert not bf16.through_fp32(torch.empty(1, dtype=torch.bfloat16, device="meta"))
        assert not caplog.messages
        for _ in range(2):
            assert bf16.through_fp32(tensor.bfloat16()) == (not instructions)
    finally:
        bf16._choose_fp32.cache_clear()
    assert len(caplog.messages) == (not instructions)
    assert all("computed in fp32" in message for message in caplog.messages)
