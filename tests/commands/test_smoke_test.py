"""`megatron-hybrid smoke-test`: real runs of it, on ranks of its own and under a launcher."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_hybrid.errors import UserError
from megatron_hybrid.smoke.check import find_ranks, work_folder
from megatron_hybrid.smoke.layouts import LAYOUTS, choose_layouts
from megatron_hybrid.smoke.run import Ranks
from tests.warm import python

LAUNCHER = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python(), "-m", "megatron_hybrid.cli", "smoke-test", *words],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_layout_agrees_with_one_rank_and_resumes(tmp_path: Path) -> None:
    """TP2 from one rank's checkpoint, one rank from TP2's; all three trainings are reported."""
    done = run("--nproc", "2", "--layouts", "TP2", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    facts, *rows = [line for line in done.stdout.splitlines() if line.strip()]
    assert "megatron-core" in facts
    assert "backend torch" in facts
    assert [re.split(r"\s+\d\.\d{4}", row)[0] for row in rows if row.split()[-1] == "yes"] == [
        "one rank", "TP2", "one rank, from TP2",
    ]  # fmt: skip
    assert rows[-1] == "all agree to 0.0001, in fp32 on the CPU"
    assert list(tmp_path.glob("megatron-hybrid-smoke-*")) == []


def test_a_training_that_fails_is_shown(tmp_path: Path) -> None:
    """The exit code is 1, and what the training said is the last on the screen."""
    script = tmp_path / "smoke_test.py"
    script.write_text(
        "from megatron_hybrid import cli\n"
        "from megatron_hybrid.smoke import check\n"
        "words = check.pretrain_words\n"
        "check.pretrain_words = lambda *args: [*words(*args), 'model.hidden_size=no']\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [python(), script, "smoke-test", "--nproc", "1", "--keep", str(tmp_path / "keep")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "one rank: the training failed" in done.stderr
    assert "model.hidden_size" in done.stderr.splitlines()[-1]


def test_layouts_that_fit(tmp_path: Path) -> None:
    """Sizes divide the ranks; what does not fit is refused with what would."""
    names = {ranks: [each.name for each in choose_layouts(ranks, None)] for ranks in (1, 2, 3, 4)}
    assert names[1] == []
    assert names[2] == ["TP2", "PP2", "CP2", "EP2", "DP"]
    assert names[3] == ["DP"]
    assert names[4] == [each.name for each in LAYOUTS]
    with pytest.raises(UserError, match=r"TP2xPP2 cannot run on 2 ranks; allowed: TP2, PP2, CP2"):
        choose_layouts(2, ["TP2", "TP2xPP2"])


def test_ranks_are_the_launchers_or_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank a GPU, two on the CPU, or what a launcher says; contradictions are refused."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert find_ranks(None, gpus=8) == Ranks(8)
    assert find_ranks(None, gpus=0) == Ranks(2)
    assert find_ranks(4, gpus=0) == Ranks(4)
    with pytest.raises(UserError, match="--nproc=3: a rank needs a GPU of its own; allowed: 1 to"):
        find_ranks(3, gpus=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is set, but not RANK, LOCAL_RANK, LOCAL_WORLD"):
        find_ranks(None, gpus=0)
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    assert find_ranks(None, gpus=0) == Ranks(2, 0)
    with pytest.raises(UserError, match="--nproc=2: a launcher has started this rank already"):
        find_ranks(2, gpus=0)


def test_folder_must_be_empty_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in a folder that holds others would resume them; nodes without one would wait."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be an empty folder"), work_folder(tmp_path, Ranks(2)):
        pass
    for name, value in (LAUNCHER | {"LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="on several nodes, --keep"), work_folder(None, Ranks(2, 0)):
        pass
