"""A run whose output nobody takes any more goes on, and saves."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_hybrid.training.attempts import read_attempts
from tests.training.runs import words
from tests.warm import python


@pytest.mark.parametrize("stderr", ["gone", "closed"])
def test_a_reader_that_is_gone(stderr: str, tmp_path: Path) -> None:
    """Neither a step's line nor the flush as Python ends fails the run."""
    command = [python(), "-m", "megatron_hybrid.cli", "pretrain", *words(tmp_path)]
    reader, writer = os.pipe()
    closed = "exec 2>&-; " if stderr == "closed" else "exec 2>&1; "
    process = subprocess.Popen(
        ["bash", "-c", f'{closed}exec "$@"', "bash", *command], stdout=writer
    )
    os.close(writer)
    os.close(reader)
    assert process.wait(timeout=240) == 0
    assert (tmp_path / "checkpoints" / "iter_0000004" / "integrity.json").is_file()
    assert read_attempts(tmp_path)[-1]["event"] == "end"
