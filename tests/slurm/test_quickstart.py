"""The quickstart's run on four ranks: however they are started, the same losses."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_hybrid.training.metrics import read_records
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, command, scenario
from tests.warm import python

CONFIG = ROOT / "examples" / "01_quickstart" / "quickstart.yaml"
STEPS = 4  # the last quarter is a phase of its own
pytestmark = pytest.mark.timeout(1200)  # a job may wait for others


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's data."""
    return make_corpus(Path(tmp_path_factory.getbasetemp()) / "corpus")


_making = threading.Lock()


def make_corpus(folder: Path) -> Path:
    """Once, for whoever comes first."""
    script = ROOT / "examples" / "01_quickstart" / "prepare.py"
    with _making:
        subprocess.run([python(), script, folder], check=True, capture_output=True)
    return folder


def line(data: Path, run_dir: Path) -> list[str]:
    """The quickstart, shortened: how ranks start and what they are told is the same."""
    paths = [f"data.sources.{name}.path={data / name}" for name in ("code", "docs", "reference")]
    return [
        str(CONFIG), *paths, f"data.tokenizer_model={data / 'tokenizer.model'}",
        f"training.train_iters={STEPS}", "training.eval_interval=null", "backend=torch",
        "data.seq_length=64", "training.micro_batch_size=1", "training.global_batch_size=4",
        f"run_dir={run_dir}",
    ]  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    found = [r["loss"] for r in read_records(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert len(found) == STEPS
    return found


# What means something to sbatch, to its patterns of file names, or to a shell.
AWKWARD = '100%a of #1, $HOME\'s "~*[0]" & ü'


@scenario
def submitted_and_by_hand(cluster: Cluster, nodes: str, folder: Path) -> tuple[Path, Path]:
    data = make_corpus(folder.parent / "corpus")  # pytest's folder of this session
    printed = command(
        "submit", *line(data, folder / AWKWARD), "--nodes", "2", "--ranks-per-node", "2",
        f"--option=--nodelist={nodes}", f"--option=--comment={AWKWARD}",
        environment=cluster.environment,
    )  # fmt: skip
    config = folder / "run.yaml"
    config.write_text(command("pretrain", *line(data, folder / "by hand"), "--dry-run"))
    by_hand = cluster.run(
        "sbatch", "--parsable", f"--chdir={ROOT}", "--nodes=2", "--ntasks-per-node=2",
        "--gpus-per-node=0", f"--nodelist={nodes}", f"--output={folder}/by_hand.out",
        str(ROOT / "slurm" / "pretrain.sbatch"),
        environment={"CONFIG": str(config), "CODE": str(ROOT)},
    )  # fmt: skip
    submitted = printed.split()[1]
    shown = cluster.run("squeue", "-h", "-t", "all", "-j", submitted, "--format=%k\n%j")
    assert shown.split("\n") == [AWKWARD, AWKWARD]
    for job in (submitted, by_hand):
        cluster.wait(lambda job=job: cluster.job_state(job) == "COMPLETED", 500, f"job {job}")
    assert len(list((folder / AWKWARD / "jobs").glob(f"*/{submitted}.out"))) == 1
    return folder / AWKWARD, folder / "by hand"


@pytest.fixture(scope="session")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of four ranks on one machine."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    command("pretrain", *line(corpus, run_dir), "--nproc", "4", environment=alone())
    return losses(run_dir)


def alone() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_submitted_and_by_hand(outcome: tuple[Path, Path], expected: list[float]) -> None:
    """Two nodes with two ranks each, by `submit` and by plain `sbatch` of slurm/pretrain.sbatch:
    the losses of four ranks on one machine, to the last bit; each rank's output is kept.
    """
    assert [losses(run_dir) for run_dir in outcome] == [expected, expected]
    submitted = next((outcome[0] / "logs").iterdir())
    assert sorted(path.name for path in submitted.glob("rank_*")) == [
        "rank_00001.txt", "rank_00002.txt", "rank_00003.txt",
    ]  # fmt: skip


MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun (pip install mpich mpi4py)")
def test_mpirun(corpus: Path, expected: list[float], tmp_path: Path) -> None:
    """Four ranks of `mpirun`, to which MPI gives the address: the same losses to the last bit."""
    # Not warm: mpirun looks after the processes that it has started itself.
    program = [sys.executable, "-m", "megatron_hybrid.cli", "pretrain"]
    done = subprocess.run(
        [MPIRUN, "-n", "4", *program, *line(corpus, tmp_path / "run")],
        env=alone(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 ranks on cpu") == 1
    assert losses(tmp_path / "run") == expected
