"""Runs of `pretrain` on one GPU, whole and in parts."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLI = "megatron_hybrid.cli"
STEPS = 8
HALF = STEPS // 2


def model_words(
    pattern: str, hidden_size: int, vocab_size: int, seq_length: int
) -> tuple[str, ...]:
    """The command line of a model, its heads such as kernels of GPUs take, and of its data."""
    return (
        f"model.hybrid_layer_pattern={pattern}", f"model.hidden_size={hidden_size}",
        f"model.num_attention_heads={hidden_size // 64}",
        f"model.num_query_groups={hidden_size // 128}",
        f"model.ffn_hidden_size={4 * hidden_size}", "model.mamba_head_dim=64",
        "model.mamba_state_dim=128", f"model.mamba_num_groups={hidden_size // 128}",
        f"model.vocab_size={vocab_size}", "data.mock_data=true", "data.tokenizer_type=null",
        f"data.seq_length={seq_length}", "optimizer.lr=3e-4",
        "optimizer.lr_decay_style=constant",
    )  # fmt: skip


RUN = (
    "training.micro_batch_size=2", "training.global_batch_size=4", "logging.tensorboard=false",
)  # fmt: skip
# Of about 400 million parameters, of 80, and of 10.
MODEL = model_words("M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-", 1024, 65536, 2048)
SMALL = model_words("M-*-M-*-", 1024, 8192, 1024)
TOY = model_words("M-*M-", 512, 512, 64)

# The kernels' backward passes add up in any order; a step of training changes the loss by 1 %.
SAME_LOSS = 2e-3


def pretrain(
    run_dir: Path, steps: int, recipe: str, model: Sequence[str] = MODEL, module: str = CLI
) -> list[float]:
    """The losses of the run so far, after `steps` of its `STEPS`.

    Args:
        module: is the command line.
    """
    from megatron_hybrid.training.metrics import read_records

    command = [
        sys.executable, "-m", module, "pretrain", *model, *RUN,
        f"training.train_iters={STEPS}", f"training.exit_interval={steps}",
        f"precision.recipe={recipe}", "backend=transformer_engine", f"run_dir={run_dir}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(run_dir / "metrics.jsonl")
    return [record["loss"] for record in records if record.get("kind") == "train"]


def in_parts(
    run_dir: Path, recipe: str, model: Sequence[str] = MODEL, module: str = CLI
) -> list[float]:
    """The losses of a run that ends half-way and goes on."""
    first = pretrain(run_dir, HALF, recipe, model, module)
    both = pretrain(run_dir, STEPS, recipe, model, module)
    assert len(first) == HALF and both[:HALF] == first
    return both


def assert_goes_on(parts: list[float], whole: list[float]) -> None:
    """The losses of a run in parts are those of an unbroken one."""
    assert len(parts) == len(whole)
    far = [abs(one - other) / abs(other) for one, other in zip(parts, whole, strict=True)]
    assert all(each <= SAME_LOSS for each in far), f"losses {parts} in parts, {whole} unbroken"
