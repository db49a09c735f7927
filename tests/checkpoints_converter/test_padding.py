"""One model imported with other paddings is one model, also where TP forces the padding."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.testing import run_distributed
from tests.checkpoints_converter.peer_models import VOCAB_SIZE, nemotron_h, saved
from tests.training.runs import losses, outcomes, records

# (ranks, padding of the import, TP, padding of the run)
RUNS = {1: [(1, 1, 1), (512, 1, 512), (512, 1, 1)], 2: [(1, 2, 2), (512, 2, 512)]}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`1` and `512`: imports of a model whose logits all lie far below those of the padding."""
    folder = tmp_path_factory.mktemp("padding")
    model = nemotron_h("M*-")
    with torch.no_grad():
        model.get_input_embeddings().weight += 5.0
        model.get_output_embeddings().weight -= 0.5
    saved(model, folder / "hf")
    for multiple in (1, 512):
        words = ["convert", "from-hf", str(folder / "hf"), str(folder / f"{multiple}")]
        done = CliRunner().invoke(app, [*words, "--make-vocab-size-divisible-by", f"{multiple}"])
        assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("ranks", RUNS)
def test_first_steps_are_the_same(ranks: int, imported: Path, tmp_path: Path) -> None:
    """An odd vocabulary is trained on under TP, from any import of it, as without padding."""
    lines, run_dirs = [], []
    for number, (multiple, tp, of_run) in enumerate([*RUNS[ranks]]):
        run_dirs.append(tmp_path / str(number))
        lines.append([
            str(imported / str(multiple) / "iter_0000000" / "run_config.yaml"),
            f"run_dir={run_dirs[-1]}", f"checkpoint.load={imported / str(multiple)}",
            "checkpoint.finetune=true", f"parallel.tensor_model_parallel_size={tp}",
            f"model.make_vocab_size_divisible_by={of_run}", "data.mock_data=true",
            "data.seq_length=32", "data.num_workers=0", "training.global_batch_size=2",
            "training.train_iters=2", "optimizer.lr=1e-3", "logging.tensorboard=false",
            "logging.log_params_norm=true",
        ])  # fmt: skip
    run_distributed(outcomes, ranks, lines)
    for run_dir in run_dirs[1:]:
        assert losses(run_dir) == pytest.approx(losses(run_dirs[0]), rel=1e-6)
        for found, expected in zip(records(run_dir), records(run_dirs[0]), strict=True):
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
            assert found["extra"] == pytest.approx(expected["extra"], rel=1e-6)
            assert found["extra"]["params_norm"] > 0
    # The padding's logits are 0 where it has its own part in the softmax.
    assert losses(run_dirs[0])[0] < 10.0, VOCAB_SIZE
