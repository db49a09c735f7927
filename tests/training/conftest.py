"""A run whose checkpoints several files of tests start from."""

from pathlib import Path

import pytest

from megatron_hybrid.testing import run_distributed
from tests.training.runs import outcomes, words


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of four steps, at steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("saved")
    line = words(run_dir, "checkpoint.save_interval=2")
    assert run_distributed(outcomes, 1, [line]) == [["finished"]]
    return run_dir / "checkpoints"
