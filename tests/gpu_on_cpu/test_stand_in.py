"""The stand-in itself: what it computes, what it refuses, and that the product runs on it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hybrid.training.metrics import read_records
from tests.gpu_on_cpu import transformer_engine_torch as compiled
from tests.gpu_on_cpu.ranks import run_on_gpus

RUN = [
    "pretrain", "tiny", "backend=transformer_engine", "model.vocab_size=128",
    "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=4",
    "data.mock_data=true", "data.tokenizer_type=null",
    "data.seq_length=32", "data.num_workers=0", "training.train_iters=2",
    "training.micro_batch_size=1", "training.global_batch_size=2", "optimizer.lr=1e-3",
    "logging.tensorboard=false",
]  # fmt: skip


def test_the_command_line_runs_as_on_a_gpu(tmp_path: Path) -> None:
    """`pretrain` trains and saves on the transformer_engine backend, in a process of its own, and
    says nothing that a user can do nothing about.
    """
    words = ["-m", "tests.gpu_on_cpu.as_on_a_gpu", *RUN, f"run_dir={tmp_path}"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 ranks on cpu, backend transformer_engine" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["iteration"] for r in records if r["kind"] == "train"] == [1, 2]
    assert (tmp_path / "checkpoints" / "iter_0000002").is_dir()


def float8_product() -> str:
    """On a rank: the first product in float8."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    linear = te.Linear(32, 32, bias=False, params_dtype=torch.bfloat16, device="cuda")
    try:
        with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
            linear(torch.ones(32, 32, dtype=torch.bfloat16))
    except NotImplementedError as error:
        return str(error)
    return "computed"


def test_what_is_not_computed_raises_by_name() -> None:
    """Nothing in float8 passes for computed."""
    (said,) = run_on_gpus(float8_product, 1)
    assert "transformer_engine_torch." in said and "has no stand-in" in said
    with pytest.raises(NotImplementedError, match="generic_gemm with gelu has no stand-in"):
        compiled.generic_gemm(
            torch.ones(2, 2), True, torch.ones(2, 2), False, None, None, None, None, 6, True, None,
            False, None, 0, False, False,
        )  # fmt: skip
