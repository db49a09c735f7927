"""The other batch scripts, sweeps and chains, on a real Slurm."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from launchers.slurm import hostnames
from megatron_hybrid.training.attempts import read_attempts
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, command, scenario
from tests.training.runs import words

pytestmark = pytest.mark.timeout(1200)  # a job may wait for others


def submit(cluster: Cluster, node: str, *more: str) -> list[str]:
    """Job ids of what is submitted, of a node with a rank."""
    printed = command(
        "submit", *more, "--nodes", "1", "--ranks-per-node", "1", f"--option=--nodelist={node}",
        environment=cluster.environment,
    )  # fmt: skip
    return [text.split()[1] for text in printed.splitlines() if text.startswith("job ")]


@scenario
def sweep_data_and_conversion(cluster: Cluster, nodes: str, folder: Path) -> Path:
    node = hostnames(nodes)[0]
    line = words(folder / "sweep", "backend=torch", "training.train_iters=2")
    (sweep,) = submit(cluster, node, *line, "--array", "optimizer.lr=1e-3,2e-3")
    with (folder / "in.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"page {n} of a book"}) + "\n" for n in range(100))
    SentencePieceTrainer.train(
        sentence_iterator=iter(["page 0123456789 of a book"] * 100), model_type="bpe",
        model_prefix=str(folder / "tokenizer"), vocab_size=40, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    cluster.wait(lambda: set(cluster.job_state(sweep).split()) == {"COMPLETED"}, 400, "sweep")
    scripts = {
        "data": {
            "INPUT": str(folder / "in.jsonl"), "OUTPUT": str(folder / "tokens"),
            "TOKENIZER_MODEL": str(folder / "tokenizer.model"),
        },
        "convert": {
            "CHECKPOINT": str(folder / "sweep" / "lr=2e-3"), "OUT": str(folder / "hf"),
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


def test_sweep_data_and_conversion(outcome: Path) -> None:
    """`--array` trains a run for each value; data.sbatch and convert.sbatch do what they say."""
    for rate in ("1e-3", "2e-3"):
        assert read_attempts(outcome / "sweep" / f"lr={rate}")[-1]["reason"] == "finished"
    assert "good, 100 documents" in (outcome / "data.out").read_text()
    assert (outcome / "hf" / "config.json").is_file()


@scenario
def chain(cluster: Cluster, nodes: str, folder: Path) -> Path:
    line = words(folder / "run", "backend=torch", "training.train_iters=160")
    first, second = submit(cluster, hostnames(nodes)[1], *line, "--chain", "2")
    metrics = folder / "run" / "metrics.jsonl"
    cluster.wait(lambda: metrics.exists() and metrics.stat().st_size > 10_000, 400, "steps")
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
