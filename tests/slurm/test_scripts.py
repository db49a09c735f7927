"""The other batch scripts, sweeps and chains, on a real Slurm."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from launchers.slurm import hostnames
from megatron_hybrid.training.attempts import read_attempts
from megatron_hybrid.training.run_time import read_jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, command, scenario
from tests.slurm.pace import HIT
from tests.training.runs import words

pytestmark = pytest.mark.timeout(1200)  # a job may wait for others


def submit(cluster: Cluster, node: str, *more: str) -> list[str]:
    """Job ids of what is submitted, of a node with a rank."""
    printed = command(
        "submit", *more, "--nodes", "1", "--ranks-per-node", "1", f"--option=--nodelist={node}",
        environment=cluster.environment,
    )  # fmt: skip
    return [text.split()[1] for text in printed.splitlines() if text.startswith("job ")]


SWEEP = (2, 12, 30)  # steps of each task


@scenario
def sweep_data_and_conversion(cluster: Cluster, nodes: str, folder: Path) -> Path:
    node = hostnames(nodes)[0]
    line = words(
        folder / "sweep", "backend=torch", "training.log_interval=1",
        "training.callbacks=[tests.slurm.pace:Slow]",
    )  # fmt: skip
    lengths = ",".join(map(str, SWEEP))
    array = ("--array", f"training.train_iters={lengths}", "--option=--exclusive=user")
    (sweep,) = submit(cluster, node, *line, *array)
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"page {n} of a book"}) + "\n" for n in range(100))
    SentencePieceTrainer.train(
        sentence_iterator=iter(["page 0123456789 of a book"] * 100), model_type="bpe",
        model_prefix=str(folder / "tokenizer"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    cluster.wait(lambda: cluster.job_state(f"{sweep}_0") == "COMPLETED", 400, "the first task")
    for steps in SWEEP[1:]:
        metrics = folder / "sweep" / f"train_iters={steps}" / "metrics.jsonl"
        cluster.wait(lambda metrics=metrics: metrics.exists(), 400, "steps of the other tasks")
    cluster.run("scancel", "--signal=USR1", "--batch", f"{sweep}_2")
    cluster.wait(lambda: cluster.restarts(f"{sweep}_2"), 100, "the last task's requeue")
    cluster.wait(lambda: set(cluster.job_state(sweep).split()) == {"COMPLETED"}, 400, "sweep")
    scripts = {
        "data": {
            "INPUT": str(folder / "in.jsonl"), "OUTPUT": str(folder / "tokens"),
            "TOKENIZER_MODEL": str(folder / "tokenizer.model"),
        },
        "convert": {
            "CHECKPOINT": str(folder / "sweep" / "train_iters=2"), "OUT": str(folder / "hf"),
            "VERIFY": "no",
        },
    }  # fmt: skip
    jobs = [
        cluster.run(
            "sbatch", "--parsable", f"--nodelist={node}", "--cpus-per-task=2", "--mem=1G",
            f"--output={folder}/{name}.out", str(ROOT / "slurm" / f"{name}.sbatch"),
            environment=variables | {"CODE": str(ROOT)},
        )
        for name, variables in scripts.items()
    ]  # fmt: skip
    for job in jobs:
        cluster.wait(lambda job=job: cluster.job_state(job) == "COMPLETED", 300, f"job {job}")
    return folder


def test_sweep_data_and_conversion(outcome: Path, cluster: Cluster) -> None:
    """`--array` trains a run for each value, of which the last one's task alone is told to save,
    and starts again; data.sbatch and convert.sbatch do what they say.
    """
    for number, (steps, ends) in enumerate(
        zip(SWEEP, (["finished"], ["finished"], ["SIGUSR1", "finished"]), strict=True)
    ):
        run_dir = outcome / "sweep" / f"train_iters={steps}"
        events = read_attempts(run_dir)
        assert [event["reason"] for event in events if event["event"] == "end"] == ends
        assert events[-1]["iteration"] == steps
        (noted,) = read_jobs(run_dir)
        assert noted["job"].endswith(f"_{number}")
        assert {event["job"] for event in events if event["event"] == "start"} == {noted["job"]}
        assert cluster.restarts(noted["job"]) == len(ends) - 1
    assert "good, 100 documents" in (outcome / "data.out").read_text()
    assert (outcome / "hf" / "config.json").is_file()


def test_a_job_names_itself(cluster: Cluster, tmp_path: Path) -> None:
    """By the task it is of an array, the last one too; a job that a task has submitted by itself,
    though it finds that task's variables. Steps have what the script exports, whatever the job's
    --export is.
    """
    for name, more in (("inner", ""), ("outer", f"sbatch --parsable {tmp_path}/inner.sh")):
        (tmp_path / f"{name}.sh").write_text(
            f"#!/bin/bash\n#SBATCH --output={tmp_path}/{name}_%j.out\n#SBATCH --cpus-per-task=2\n"
            f"#SBATCH --export=ONLY=this\nsource {ROOT}/slurm/job.sh\n"
            f"srun bash -c 'echo $JOB ${{SLURM_ARRAY_JOB_ID:-none}} $SRUN_CPUS_PER_TASK'; {more}\n"
        )
    array = cluster.run("sbatch", "--parsable", "--array=0-1", str(tmp_path / "outer.sh"))
    cluster.wait(lambda: len(list(tmp_path.glob("inner_*"))) == 2, 60, "the inner jobs")
    states = {path.stem.partition("_")[2] for path in tmp_path.glob("*_*.out")}
    for job in states:
        cluster.wait(lambda job=job: cluster.job_state(job).split()[0] == "COMPLETED", 60, "a job")
    said = [path.read_text().split("\n")[0] for path in sorted(tmp_path.glob("outer_*"))]
    assert sorted(said) == [f"{array}_{number} {array} 2" for number in (0, 1)]
    for path in tmp_path.glob("inner_*"):
        assert path.read_text() == f"{path.stem.removeprefix('inner_')} none 2\n"


@scenario
def chain(cluster: Cluster, nodes: str, folder: Path) -> Path:
    line = words(
        folder / "run", "backend=torch", "training.train_iters=24", "training.log_interval=1",
        "training.callbacks=[tests.slurm.pace:Slow]",
    )  # fmt: skip
    first, second = submit(cluster, hostnames(nodes)[1], *line, "--chain", "2")
    metrics = folder / "run" / "metrics.jsonl"
    cluster.wait(
        lambda: metrics.exists() and metrics.read_bytes().count(b'"kind":"train"') >= HIT, 400,
        "steps",
    )  # fmt: skip
    cluster.run("scancel", "--signal=USR1", "--batch", first)
    cluster.wait(lambda: cluster.job_state(second) == "COMPLETED", 400, "the second job")
    return folder / "run"


def test_chain(outcome: Path) -> None:
    """The first job of a chain runs out of time; the second goes on at the next step and ends."""
    events = read_attempts(outcome)
    ends = [event for event in events if event["event"] == "end"]
    starts = [event for event in events if event["event"] == "training"]
    assert [event["reason"] for event in ends] == ["SIGUSR1", "finished"]
    assert starts[1]["iteration"] == ends[0]["iteration"] > 0
    assert starts[0]["attempt"].split(".")[0] != starts[1]["attempt"].split(".")[0]


# What is wrong with the environment of the second node: a torch of another version, and its clock.
OTHER_VERSION = "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n"
OTHER_CLOCK = "import time\nnow = time.time\ntime.time = lambda: now() - 60\n"


@scenario
def preflight_of_two_nodes(
    cluster: Cluster, nodes: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    second, other = hostnames(nodes)[1], folder / "other"
    (other / "torch-9.9.9.dist-info").mkdir(parents=True)
    (other / "torch-9.9.9.dist-info" / "METADATA").write_text(OTHER_VERSION)
    (other / "sitecustomize.py").write_text(OTHER_CLOCK)
    line = words(Path("/dev/shm/run"), "backend=torch")  # each node has a /dev/shm of its own
    rank = (
        f"[ $(hostname) != {second} ] || export PYTHONPATH={other}:$PYTHONPATH; "
        'exec "$0" -m megatron_hybrid.cli preflight "$@"'
    )
    return subprocess.run(
        ["srun", "--nodes=2", "--ntasks-per-node=1", f"--nodelist={nodes}", "bash", "-c", rank,
         sys.executable, *line],
        env=cluster.environment | {"COLUMNS": "200"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def test_preflight_of_two_nodes(outcome: subprocess.CompletedProcess[str]) -> None:
    """A node with another torch, a clock that is off and no sight of the run's folder: preflight
    over both names it for each, finds nothing else wrong, and ends with an error.
    """
    assert outcome.returncode == 1, outcome.stderr
    lines = outcome.stdout.splitlines()
    problems = [line.strip() for line in lines if line.startswith("  - ")]
    assert len(problems) == 3
    assert re.fullmatch(r"- (node\d+) has torch 9.9.9, node\d+ has \S+", problems[0])
    assert re.match(r"- the clock of (node\d+) is -(59|60)\.\d s off that of node", problems[1])
    assert re.match(r"- run_dir=/dev/shm/run of node\d+ is not what node\d+ sees", problems[2])
    assert sum(" good " in line for line in lines) == 11
