"""A run that was stopped, or killed, and resumed equals the run that never was: bit for bit.

Real processes: the command line starts two ranks, which train, save and are signalled. What is cut
off lies before a phase of the data with another blend and longer samples.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.metrics import read_records
from megatron_hybrid.training.step_metrics import TIMING_FIELDS
from tests.data.conftest import write_corpus
from tests.warm import program_of, python

STEPS = 20  # the first 12 of samples of 64 tokens, the others of 128
VOCAB_SIZE = 512
CONFIG = """
preset: tiny
model: {{hybrid_layer_pattern: M*E-, vocab_size: {vocab_size}}}
precision: {{recipe: bf16}}
data:
  tokenizer_type: "null"
  sources:
    web: {{path: {folder}/web}}
    code: {{path: {folder}/code}}
    math: {{path: {folder}/math}}
  phases:
    - {{name: broad, weights: {{web: 5, code: 3, math: 2}}}}
    - {{name: long, start_tokens: 6144, weights: {{code: 1, math: 2}}, seq_length: 128}}
  seq_length: 64
  num_workers: 0
training:
  {{micro_batch_size: 4, global_batch_size: 8, train_tokens: 14336, eval_interval: null}}
checkpoint: {{save_interval: 5, keep_last: null}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two phases over three small sources."""
    folder = tmp_path_factory.mktemp("data")
    draws = np.random.default_rng(0)
    for name in ("web", "code", "math"):
        documents = [[*draws.integers(0, VOCAB_SIZE - 1, 90), VOCAB_SIZE - 1] for _ in range(200)]
        write_corpus(folder / name, documents, VOCAB_SIZE)
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(folder=folder, vocab_size=VOCAB_SIZE))
    return path


def start(config: Path, run_dir: Path, *more: str) -> "subprocess.Popen[str]":
    command = [python(), "-m", "megatron_hybrid.cli", "pretrain", str(config)]
    return subprocess.Popen(
        [*command, "--nproc", "2", f"run_dir={run_dir}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What is killed leaves its temporary files.
        env=os.environ | {"TMPDIR": str(run_dir.parent)},
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """The rest of the output of a run that must succeed."""
    output, _ = process.communicate(timeout=300)
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
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(config, run_dir))
    assert (run_dir / "data_plan.png").read_bytes().startswith(b"\x89PNG")
    assert [step["phase"] for step in steps(run_dir)] == ["broad"] * 12 + ["long"] * 8
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
    # SIGUSR1 is what Slurm's jobs are told with: tests/slurm.
    [(signal.SIGTERM, False), (signal.SIGTERM, True)],
    ids=["SIGTERM", "SIGTERM-async"],
)
def test_stopped_by_signal(
    number: signal.Signals, background: bool, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """A signal after step 10 saves and ends the run with exit code 0; the next start goes on."""
    more = [f"checkpoint.async_save={str(background).lower()}"]
    process = start(config, tmp_path, *more)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 10/"):
            process.send_signal(number)
            break
    output = finish(process)
    stopped_at = len(steps(tmp_path))
    assert 10 <= stopped_at < STEPS, output
    assert f"saved {tmp_path}/checkpoints/iter_{stopped_at:07d}" in output
    assert f"step {stopped_at}" in finish(start(config, tmp_path, *more))
    assert_equal_runs(tmp_path, uninterrupted)


def _partial_saves(run_dir: Path) -> Iterator[Path]:
    return (run_dir / "checkpoints").glob(".iter_*.part")


def test_killed_while_saving(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a save leaves the checkpoint before it, from which the run goes on.

    What had been written of the new one, and the metrics of the lost steps, are discarded.
    """
    for _ in range(5):
        process = start(config, tmp_path)
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
    assert f"loaded {tmp_path}/checkpoints/iter_{whole:07d}" in finish(start(config, tmp_path))
    assert not list(_partial_saves(tmp_path))
    assert_equal_runs(tmp_path, uninterrupted)


def kill_during_save(process: "subprocess.Popen[str]", run_dir: Path) -> None:
    """SIGKILL the launcher and its ranks at the second save that begins."""
    first = run_dir / "checkpoints" / "iter_0000005"
    while process.poll() is None:
        if first.exists() and any(_partial_saves(run_dir)):
            launcher = program_of(process.pid)
            for pid in [*_children(launcher), launcher]:
                os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.communicate()


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
