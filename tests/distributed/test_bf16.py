"""Layouts in bf16, where parameters have two formats, against the same layouts in fp32."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from tests.training.runs import losses, trainer, words

PATTERN = "M|*|-|M"
VPP2 = ["parallel.pipeline_model_parallel_size=2", "training.micro_batch_size=1"]
LAYOUTS = {
    "PP2 x VPP2": (2, VPP2),
    "PP2 x VPP2 x DP2": (4, VPP2),
    "PP2 x VPP2, overlapped": (
        2,
        [
            *VPP2, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
        ],
    ),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2", "model.hybrid_layer_pattern=M*|-M"]),
    "TP2 SP": (
        2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ),
    "CP2 x DP2": (4, ["parallel.context_parallel_size=2"]),
}  # fmt: skip


def trained(lines: list[list[str]]) -> None:
    """On a rank: runs, one after the other."""
    for line in lines:
        with trainer(line) as run:
            run.run()


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_in_fp32(name: str, tmp_path: Path) -> None:
    """Six updates from the same weights at a high learning rate; those in fp32 equal one rank's.

    Embedding, scan parameters and matrices of both formats must all get their updates.
    """
    ranks, more = LAYOUTS[name]
    run_dirs = {recipe: tmp_path / recipe for recipe in ("bf16", "fp32")}
    lines = [
        words(
            run_dir, f"model.hybrid_layer_pattern={PATTERN}", f"precision.recipe={recipe}",
            "optimizer.lr=5e-3", "training.train_iters=6", *more,
        )
        for recipe, run_dir in run_dirs.items()
    ]  # fmt: skip
    run_distributed(trained, ranks, lines)
    found, expected = (losses(run_dir) for run_dir in run_dirs.values())
    assert expected[-1] < expected[0] - 0.05  # it learns, so that a lost update shows
    torch.testing.assert_close(found, expected, rtol=0.005, atol=0)
