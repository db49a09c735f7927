"""The quickstart's run on several ranks: however they are started, the same losses."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.training.metrics import read_records
from tests.data.conftest import write_corpus
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, command, scenario

CONFIG = ROOT / "examples" / "01_quickstart" / "quickstart.yaml"
SOURCES, VOCAB_SIZE = ("code", "docs", "reference"), 512
STEPS = 4  # the last quarter is a phase of its own
pytestmark = pytest.mark.timeout(1200)  # a job may wait for others


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the quickstart's sources, a little."""
    return make_corpus(Path(tmp_path_factory.getbasetemp()) / "corpus")


_making = threading.Lock()


def make_corpus(folder: Path) -> Path:
    """Once, for whoever comes first."""
    draws = np.random.default_rng(0)
    with _making:
        for name in () if folder.exists() else SOURCES:
            documents = draws.integers(0, VOCAB_SIZE - 1, (60, 50)).tolist()
            write_corpus(folder / name, [[*d, VOCAB_SIZE - 1] for d in documents], VOCAB_SIZE)
    return folder


def line(data: Path, run_dir: Path) -> list[str]:
    """The quickstart, shortened: how ranks start and what they are told is the same."""
    paths = [f"data.sources.{name}.path={data / name}" for name in SOURCES]
    return [
        str(CONFIG), *paths, "data.tokenizer_type=null", "data.tokenizer_model=null",
        f"model.vocab_size={VOCAB_SIZE}", "model.hybrid_layer_pattern=M*E-",
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
    return on_one_machine(corpus, tmp_path_factory.mktemp("one") / "run", 4)


def on_one_machine(data: Path, run_dir: Path, ranks: int) -> list[float]:
    command("pretrain", *line(data, run_dir), "--nproc", str(ranks), environment=alone())
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
def test_mpirun(corpus: Path, tmp_path: Path) -> None:
    """Two ranks of `mpirun`, to which MPI gives the address: the losses of two on one machine, to
    the last bit.
    """
    # Not warm: mpirun looks after the processes that it has started itself.
    program = [sys.executable, "-m", "megatron_hybrid.cli", "pretrain"]
    done = subprocess.run(
        [MPIRUN, "-n", "2", *program, *line(corpus, tmp_path / "run")],
        env=alone(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on cpu") == 1
    assert losses(tmp_path / "run") == on_one_machine(corpus, tmp_path / "alone", 2)
