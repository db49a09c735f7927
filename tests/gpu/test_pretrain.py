"""Pretraining of a model of about 400 million parameters on one GPU, with a resume."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.config import load_config
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.training.metrics import read_records

MODEL = [
    "model.hybrid_layer_pattern=M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-", "model.hidden_size=1024",
    "model.num_attention_heads=16", "model.num_query_groups=8", "model.ffn_hidden_size=4096",
    "model.mamba_head_dim=64", "model.mamba_state_dim=128", "model.mamba_num_groups=8",
    "model.vocab_size=65536", "data.mock_data=true", "data.tokenizer_type=null",
    "data.seq_length=2048", "training.micro_batch_size=2", "training.global_batch_size=4",
    "optimizer.lr=3e-4", "optimizer.lr_decay_style=constant", "logging.tensorboard=false",
]  # fmt: skip


def pretrain(run_dir: Path, steps: int, recipe: str) -> list[float]:
    """The losses of the run so far, after `steps` of its 8."""
    command = [
        sys.executable, "-m", "megatron_hybrid.cli", "pretrain", *MODEL,
        "training.train_iters=8", f"training.exit_interval={steps}",
        f"precision.recipe={recipe}", "backend=transformer_engine", f"run_dir={run_dir}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(run_dir / "metrics.jsonl")
    return [record["loss"] for record in records if record.get("kind") == "train"]


def test_the_model_is_of_that_size(tmp_path: Path) -> None:
    """The config is good, and has 350 to 450 million parameters."""
    config = load_config([*MODEL, "training.train_iters=8", f"run_dir={tmp_path}"], world_size=1)
    assert 350e6 < count_parameters(config.model).total < 450e6


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_tensorwise"])
def test_trains_and_resumes(recipe: str, tmp_path: Path) -> None:
    """Eight steps in two runs: the second goes on where the first ended, and the loss falls."""
    from megatron_hybrid.platform.backend import probe

    if probe().missing:
        pytest.skip(f"transformer_engine needs {', '.join(probe().missing)}")
    first = pretrain(tmp_path, 4, recipe)
    both = pretrain(tmp_path, 8, recipe)
    assert len(first) == 4 and both[:4] == first and len(both) == 8
    assert both[-1] < both[0]
