"""Batch scripts filled in."""

import os
import re
import shutil
import subprocess
import sys
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


def test_what_is_yes_or_no_is_nothing_else() -> None:
    """Each that a script compares with either; `true` would be as good as no."""
    there = 0
    for script in FOLDER.glob("*.sbatch"):
        text = script.read_text()
        names = set(re.findall(r'"\$(\w+)" = (?:yes|no)\b', text))
        told = re.findall(r"^require_yes_or_no (.*)$", text, re.MULTILINE)
        assert names == set(" ".join(told).split())
        there += len(names)
    assert there == 2
    for value in ("yes", "no", "true", ""):
        done = subprocess.run(
            ["bash", "-c", f"source {FOLDER}/job.sh; require_yes_or_no VERIFY"],
            env={"SLURM_JOB_ID": "1", "VERIFY": value}, capture_output=True, text=True,
        )  # fmt: skip
        right = value in ("yes", "no")
        assert done.returncode == (not right)
        assert right or done.stderr == f"error: VERIFY={value} must be yes or no\n"


def test_ranks_run_the_copy_of_the_code(tmp_path: Path) -> None:
    """Not what has become of the source tree since, though the job is in its folder: its packages
    would come first in what `python -m` goes through."""
    for package in ("megatron_hybrid", "launchers", "checkpoints_converter"):
        folder = tmp_path / "kept" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / "kept" / "megatron_hybrid" / "cli.py").write_text("print('kept')")
    shutil.copytree(tmp_path / "kept", tmp_path / "tree")
    (tmp_path / "tree" / "megatron_hybrid" / "cli.py").write_text("print('edited since')")
    script = (FOLDER / "pretrain.sbatch").read_text()
    in_copy = script[script.index("in_copy='") : script.index("# The signals of the scheduler")]
    run = 'bash -c "$in_copy" start "$PYTHON" -m megatron_hybrid.cli'
    done = subprocess.run(
        ["bash", "-c", f'source "$JOB_SH"\n{in_copy}\n{run}'],
        cwd=tmp_path / "tree", capture_output=True, text=True, check=True,
        env={
            "PATH": os.environ["PATH"], "PYTHON": sys.executable, "JOB_SH": f"{FOLDER}/job.sh",
            "CODE": str(tmp_path / "kept"), "NODE_TMP": str(tmp_path), "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "node",
        },
    )  # fmt: skip
    assert done.stdout == "kept\n"
