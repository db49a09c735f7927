"""Jobs on a real Slurm that are preempted, cut off, killed or hang: they come back by themselves,
and end with the parameters of the run that was left alone, bit for bit.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launchers.slurm import hostnames
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.training.attempts import read_attempts
from megatron_hybrid.training.run_time import run_time
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, command, scenario
from tests.slurm.pace import HIT
from tests.training.runs import words
from tests.warm import program_of

STEPS, INTERVAL = 24, 8
HANG_S = 20
pytestmark = pytest.mark.timeout(1200)  # a job may wait for others


def line(run_dir: Path, *more: str) -> list[str]:
    return words(
        run_dir, f"training.train_iters={STEPS}", f"checkpoint.save_interval={INTERVAL}",
        "backend=torch", "training.log_interval=1", *more,
    )  # fmt: skip


class Run:
    """A run of some nodes with a rank each, submitted."""

    def __init__(
        self, cluster: Cluster, nodes: str, folder: Path, *more: str, size: int = 2
    ) -> None:
        self.cluster, self.run_dir = cluster, folder / "run"
        printed = command(
            "submit", *line(self.run_dir, *more), "--nodes", str(size), "--ranks-per-node", "1",
            f"--option=--nodelist={nodes}", "training.callbacks=[tests.slurm.pace:Slow]",
            environment=cluster.environment,
        )  # fmt: skip
        self.job = printed.split()[1]

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are logged."""
        metrics = self.run_dir / "metrics.jsonl"
        self.cluster.wait(
            lambda: metrics.exists() and metrics.read_bytes().count(b'"kind":"train"') >= step,
            400, f"step {step} of job {self.job}",
        )  # fmt: skip

    def wait_for_end(self, state: str = "COMPLETED") -> str:
        """Until the job has ended so; its output."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.cluster.wait(lambda: self.cluster.job_state(self.job) in ends, 400, "the job's end")
        output = self.output()
        assert self.cluster.job_state(self.job) == state, output
        return output

    def output(self) -> str:
        return next(self.run_dir.glob(f"jobs/*/{self.job}.out")).read_text()

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.process_iter(["cmdline"]):
            at = process.info["cmdline"] or [""]
            ours = "pretrain" in at and f"run_dir={self.run_dir}" in at and at[0] == sys.executable
            if ours and process.environ().get("SLURM_PROCID") == str(number):
                return psutil.Process(program_of(process.pid))
        raise AssertionError(f"no rank {number}")

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in read_attempts(self.run_dir) if event["event"] == "training"]


def parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, the optimizer's included."""
    with CheckpointReader(run_dir / "checkpoints" / f"iter_{STEPS:07d}") as reader:
        return {name: reader.read(name) for name in reader.tensors}


@pytest.fixture(scope="session")
def alone(
    outcomes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The parameters of the run that nothing happened to, on this machine."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command("pretrain", *line(run_dir), "--nproc", "2", environment=environment)
    return parameters(run_dir)


def check(run: Run, alone: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Started twice, it came to the same bits; the event of the second start."""
    found = parameters(run.run_dir)
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    _, second = run.starts()
    assert second["iteration"] >= INTERVAL
    return second


@scenario
def preempted(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    run = Run(cluster, nodes, folder)
    run.wait_for_step(HIT)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", f"--nodelist={nodes}", "--exclusive",
        "-o", "/dev/null", "--wrap", "sleep 1",
    )  # fmt: skip
    cluster.wait(lambda: cluster.job_state(urgent) == "COMPLETED", 300, "the urgent job")
    return run, run.wait_for_end()


def test_preempted(outcome: tuple[Run, str], alone: dict[str, torch.Tensor]) -> None:
    """A job of higher priority takes the nodes: saved, requeued, no step is done twice."""
    run, output = outcome
    assert "told to save and end" in output
    assert "again: SIG" in output or "again: signal" in output
    second = check(run, alone)
    assert second["iteration"] >= HIT
    assert second["rewound_steps"] == 0
    spent = run_time(run.run_dir, time.time())
    assert (spent.attempts, spent.failures, spent.ended) == (2, 0, "finished")
    assert spent.seconds("queue") > 5  # a requeued job waits for so long at least
    assert [span.cause for span in spent.spans].count("start-up") == spent.attempts
    assert spent.seconds("rewound") == 0
    printed = command("status", str(run.run_dir), environment=run.cluster.environment)
    assert f"{run.job}: COMPLETED" in printed
    assert re.search(r"goodput +\d+\.\d% of 00:0", printed)


@scenario
def time_limit(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    run = Run(cluster, nodes, folder)
    run.wait_for_step(HIT)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job)
    return run, run.wait_for_end()


def test_time_limit(
    outcome: tuple[Run, str], alone: dict[str, torch.Tensor], cluster: Cluster
) -> None:
    """The signal before the time limit: saved, requeued, no step is done twice.

    It is sent as Slurm sends it, to the batch script; Slurm's own clock is half a minute wide.
    """
    run, _ = outcome
    assert check(run, alone)["rewound_steps"] == 0
    assert cluster.restarts(run.job) == 1


@scenario
def lost_node(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    run = Run(cluster, nodes, folder)
    run.wait_for_step(HIT)
    node = hostnames(nodes)[1]
    cluster.cut_node(node)
    cluster.boot_node(node)
    return run, run.wait_for_end()


def test_lost_node(outcome: tuple[Run, str], alone: dict[str, torch.Tensor]) -> None:
    """A node without power: requeued by Slurm, on from the last whole checkpoint."""
    assert check(outcome[0], alone)["rewound_steps"] < INTERVAL


@scenario
def killed_rank(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    run = Run(cluster, nodes, folder)
    run.wait_for_step(HIT)
    run.rank(1).kill()
    return run, run.wait_for_end()


def test_killed_rank(outcome: tuple[Run, str], alone: dict[str, torch.Tensor]) -> None:
    """kill -9, as the kernel does when memory is out: requeued, on from the last checkpoint."""
    run, output = outcome
    assert "again: failed" in output and "(1 of 3 times)" in output
    assert check(run, alone)["rewound_steps"] < INTERVAL


@scenario
def hang(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    run = Run(cluster, nodes, folder, f"training.hang_timeout_s={HANG_S}")
    run.wait_for_step(HIT)
    run.rank(1).send_signal(signal.SIGSTOP)
    return run, run.wait_for_end()


def test_hang(outcome: tuple[Run, str], alone: dict[str, torch.Tensor]) -> None:
    """A rank that stops is named within the timeout, with the collective that the other waits in
    and all stacks; the job is requeued.
    """
    run, output = outcome
    assert f"hang: nothing has moved for {HANG_S} s, after step" in output
    assert "rank 1 did not arrive, and does not answer" in output
    assert re.search(r"rank 0 waits in \w+ of ranks 0-1, called by core/\S+:\d+ \w+", output)
    stacks = next(run.run_dir.glob("logs/*/stacks_rank_00000.txt")).read_text()
    assert "megatron_hybrid/training/trainer.py" in stacks
    check(run, alone)


@scenario
def one_rank_that_cannot_be_helped(cluster: Cluster, nodes: str, folder: Path) -> tuple[str, str]:
    config = folder / "run.yaml"
    config.write_text(command("pretrain", *line(folder / "run"), "--dry-run"))
    job = cluster.run(
        "sbatch", "--parsable", f"--chdir={ROOT}", "--nodes=1", "--ntasks-per-node=1",
        "--gpus-per-node=0", f"--nodelist={hostnames(nodes)[0]}", f"--output={folder}/out",
        str(ROOT / "slurm" / "pretrain.sbatch"),
        environment={"CONFIG": str(config), "CODE": str(ROOT), "RUN_DIR": "/proc/run"},
    )  # fmt: skip
    short = cluster.run(
        "sbatch", "--parsable", f"--chdir={ROOT}", "--nodes=1", "--ntasks-per-node=1",
        "--gpus-per-node=0", f"--nodelist={hostnames(nodes)[1]}", f"--output={folder}/short",
        "--time=00:03:00", str(ROOT / "slurm" / "pretrain.sbatch"),
        environment={"CONFIG": str(config), "CODE": str(ROOT)},
    )  # fmt: skip
    for each in (job, short):
        cluster.wait(lambda each=each: cluster.job_state(each) == "FAILED", 400, "the job's end")
        assert cluster.restarts(each) == 0
    return (folder / "out").read_text(), (folder / "short").read_text()


def test_one_rank_that_cannot_be_helped(outcome: tuple[str, str]) -> None:
    """What the user has to mend is not tried again: here a folder that cannot be written, and a
    time limit that is shorter than the script's notice before it.
    """
    unwritable, short = outcome
    assert "error: " in unwritable and "/proc/run" in unwritable
    assert "error: the time limit leaves 1" in short and "to end 300 s before it" in short
    for output in outcome:
        assert "Traceback" not in output
        assert "again" not in output


@scenario
def crash_loop(cluster: Cluster, nodes: str, folder: Path) -> tuple[Run, str]:
    more = ("optimizer.lr=1e30", "optimizer.clip_grad=0")
    run = Run(cluster, hostnames(nodes)[0], folder, *more, size=1)
    return run, run.wait_for_end("FAILED")


def test_crash_loop(outcome: tuple[Run, str], cluster: Cluster) -> None:
    """The same step with the same error, three times: the job fails and says so."""
    run, output = outcome
    assert output.count("again: failed after step") == 2
    assert "stop: 3 times in a row the ranks failed after step" in output
    assert cluster.restarts(run.job) == 2
