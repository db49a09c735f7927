"""A run that was stopped, or killed, and resumed equals the run that never was: bit for bit.

Real processes: the command line starts two ranks, which train, save and are signalled.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.metrics import read_records
from megatron_hybrid.training.step_metrics import TIMING_FIELDS

STEPS = 20
COMMAND = [
    sys.executable, "-m", "megatron_hybrid.cli", "pretrain", "tiny", "--nproc", "2",
    "model.hybrid_layer_pattern=M*E-", "model.vocab_size=512", "data.tokenizer_type=null",
    "data.mock_data=true", "data.seq_length=64", "data.num_workers=0", "precision.recipe=bf16",
    "training.micro_batch_size=2", "training.global_batch_size=8", f"training.train_iters={STEPS}",
    "training.eval_interval=null", "checkpoint.save_interval=5", "checkpoint.keep_last=null",
]  # fmt: skip


def start(run_dir: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*COMMAND, f"run_dir={run_dir}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """The rest of the output of a run that must succeed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The training steps of a run, without what a clock decides."""
    return [
        {name: value for name, value in record.items() if name not in TIMING_FIELDS}
        for record in read_records(run_dir / "metrics.jsonl")
        if record["kind"] == "train"
    ]


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """On a rank: all tensors of a checkpoint, parameters and optimizer state."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def last_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"iter_{STEPS:07d}"
    return dict(run_distributed(load_tensors, 1, folder)[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(run_dir))
    return run_dir


def assert_equal_runs(run_dir: Path, expected: Path) -> None:
    """Logged steps, parameters and optimizer state are the same bits."""
    assert steps(run_dir) == steps(expected)
    assert len(steps(run_dir)) == STEPS
    actual, wanted = last_tensors(run_dir), last_tensors(expected)
    assert actual.keys() == wanted.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in wanted)
    for key, tensor in wanted.items():
        assert tensor.dtype == actual[key].dtype
        assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGUSR1, False)],
    ids=["SIGTERM", "SIGTERM-async", "SIGUSR1"],
)
def test_stopped_by_signal(
    number: signal.Signals, background: bool, uninterrupted: Path, tmp_path: Path
) -> None:
    """A signal after step 10 saves and ends the run with exit code 0; the next start goes on."""
    more = [f"checkpoint.async_save={str(background).lower()}"]
    process = start(tmp_path, *more)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(number)
            break
    output = finish(process)
    stopped_at = len(steps(tmp_path))
    assert 10 <= stopped_at < STEPS, output
    assert f"saved {tmp_path}/checkpoints/iter_{stopped_at:07d}" in output
    assert f"step {stopped_at}" in finish(start(tmp_path, *more))
    assert_equal_runs(tmp_path, uninterrupted)


def _partial_saves(run_dir: Path) -> Iterator[Path]:
    return (run_dir / "checkpoints").glob(".iter_*.part")


def test_killed_while_saving(uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a save leaves the checkpoint before it, from which the run goes on.

    What had been written of the new one, and the metrics of the lost steps, are discarded.
    """
    for _ in range(5):
        process = start(tmp_path)
        kill_during_save(process, tmp_path)
        partial = list(_partial_saves(tmp_path))
        if partial and (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").exists():
            break
    else:
        pytest.fail("no kill hit a save in five runs")
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    whole = int(tracker.read_text())
    assert not (
        tmp_path / "checkpoints" / partial[0].name.strip(".").removesuffix(".part")
    ).exists()
    assert f"loaded {tmp_path}/checkpoints/iter_{whole:07d}" in finish(start(tmp_path))
    assert not list(_partial_saves(tmp_path))
    assert_equal_runs(tmp_path, uninterrupted)


def kill_during_save(process: "subprocess.Popen[str]", run_dir: Path) -> None:
    """SIGKILL the launcher and its ranks at the second save that begins."""
    first = run_dir / "checkpoints" / "iter_0000005"
    while process.poll() is None:
        if first.exists() and any(_partial_saves(run_dir)):
            for pid in [*_children(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.communicate()


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
