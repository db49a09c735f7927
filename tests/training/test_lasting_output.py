"""A run whose output nobody takes any more goes on, and saves."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_hybrid.training.attempts import read_attempts
from tests.training.runs import words


def test_a_reader_that_is_gone(tmp_path: Path) -> None:
    """Neither a step's line nor the flush as Python ends fails the run."""
    command = [sys.executable, "-m", "megatron_hybrid.cli", "pretrain", *words(tmp_path)]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait(timeout=240) == 0
    assert (tmp_path / "checkpoints" / "iter_0000004" / "integrity.json").is_file()
    assert read_attempts(tmp_path)[-1]["event"] == "end"
