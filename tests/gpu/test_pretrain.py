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

# The kernels' backward passes add up in any order; a step of training changes the loss by 1 %.
SAME_LOSS = 2e-3


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


def assert_goes_on(parts: list[float], whole: list[float]) -> None:
    """The losses of a run in parts are those of an unbroken one."""
    assert len(parts) == len(whole)
    assert parts == pytest.approx(whole, rel=SAME_LOSS)


@pytest.mark.parametrize("wrong", ["step lost", "step read twice", "other weights"])
def test_a_wrong_resume_is_seen(wrong: str) -> None:
    """The comparison itself: losses that go on otherwise are not those of an unbroken run."""
    whole = [11.16, 11.08, 10.93, 10.71, 10.45, 10.2, 9.98, 9.8]
    assert_goes_on([*whole[:4], *(loss * 1.0005 for loss in whole[4:])], whole)
    after = {
        "step lost": [*whole[5:], 9.65],
        "step read twice": whole[3:7],
        "other weights": [11.16, 11.08, 10.93, 10.71],
    }[wrong]
    with pytest.raises(AssertionError):
        assert_goes_on([*whole[:4], *after], whole)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_tensorwise"])
def test_trains_and_resumes(recipe: str, tmp_path: Path) -> None:
    """Eight steps in two runs are those of one that is not interrupted, and the loss falls."""
    from megatron_hybrid.platform.backend import probe

    if probe().missing:
        pytest.skip(f"transformer_engine needs {', '.join(probe().missing)}")
    first = pretrain(tmp_path / "parts", 4, recipe)
    both = pretrain(tmp_path / "parts", 8, recipe)
    assert len(first) == 4 and both[:4] == first
    assert_goes_on(both, pretrain(tmp_path / "whole", 8, recipe))
    assert both[-1] < both[0]
