"""Batch scripts filled in."""

import subprocess
from pathlib import Path

import pytest

from launchers.sbatch import Job, render
from megatron_hybrid.errors import UserError

FOLDER = Path(__file__).parents[2] / "slurm"
JOB = Job(nodes=4, ranks_per_node=2, gpus_per_node=0, time_limit="1:00:00", name="a run",
          partition="gpu", options=("--qos=high", "--exclusive=user"))  # fmt: skip


def test_options_and_variables_take_their_places() -> None:
    """Those that the script has are replaced, others added, unwanted ones gone; quoted for bash."""
    text = render((FOLDER / "pretrain.sbatch").read_text(), JOB, {"CONFIG": "/a b/c.yaml"})
    options = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in ("--nodes=4", "--ntasks-per-node=2", "--time=1:00:00", "--partition=gpu",
                   "--qos=high", "--exclusive=user"):  # fmt: skip
        assert options.count(f"#SBATCH {option}") == 1
    assert not any("gpus" in option for option in options)
    assert "#SBATCH --exclusive" not in options
    assert "\nCONFIG='/a b/c.yaml'\n" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_the_script_does_not_have_is_refused() -> None:
    """A template without the variable would run something else."""
    with pytest.raises(UserError, match="sets no CONFIG"):
        render("#!/bin/bash\n#SBATCH --nodes=1\n", JOB, {"CONFIG": "x"})


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    """No script has a syntax error."""
    subprocess.run(["bash", "-n", str(script)], check=True)
