"""Whole runs on the transformer_engine backend: FusedAdam, layouts, checkpoints, on pretended GPUs.

The first two steps of a run are those of one backend; what goes on from its checkpoint in another
way is held against what goes on in the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.testing import run_distributed
from tests.gpu_on_cpu.ranks import run_on_gpus
from tests.training import runs

TE = "transformer_engine"
MODEL = [*runs.MOE, "model.hybrid_layer_pattern=M*|E-", "checkpoint.save_interval=2"]
LAYOUTS = {
    "TP2 with SP": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "EP2": ["parallel.expert_model_parallel_size=2"],
    "PP2": ["parallel.pipeline_model_parallel_size=2"],
    "PP2 x VPP2": ["parallel.pipeline_model_parallel_size=2", "model.hybrid_layer_pattern=M|*|E|-"],
    "DP2 overlapped": ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
}
RECOMPUTED = {
    "layers": [
        "training.recompute_granularity=full", "training.recompute_method=uniform",
        "training.recompute_num_layers=1",
    ],
    "modules": [
        "training.recompute_granularity=selective",
        "training.recompute_modules=[core_attn,mlp,moe]",
    ],
}  # fmt: skip
# Between backends sums are taken in another order.
SAME = {"rel": 2e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by name, all of which finished; those named `x from y` go on from y's second step."""
    folder = tmp_path_factory.mktemp("runs")
    run_on_gpus(train_alone, 1, folder)
    lines = [line(folder, f"{name} from torch", *words) for name, words in LAYOUTS.items()]
    assert run_on_gpus(runs.outcomes, 2, lines, TE) == [["finished"] * len(lines)] * 2
    return folder


def line(folder: Path, name: str, *more: str) -> list[str]:
    """The words of a run of four steps."""
    _, _, start = name.partition(" from ")
    words = runs.words(folder / name, *MODEL, *more)
    if not start:
        return words
    load = checkpoint(folder, start, 2).parent
    return [*words, f"checkpoint.load={load}", "training.exit_interval=null"]


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return folder / name / "checkpoints" / f"iter_{step:07d}"


def train_alone(folder: Path) -> None:
    """On one rank: those that need no second."""

    def train(backend: str, name: str, *words: str, ends: str = "finished") -> None:
        assert runs.outcomes([line(folder, name, *words)], backend) == [ends]

    def begin(backend: str, name: str, *words: str) -> None:
        train(backend, name, "training.exit_interval=2", *words, ends="exit_interval")

    again = ["checkpoint.finetune=true", "training.train_iters=2"]
    packed = [*again, "data.packed_documents=true"]
    begin("torch", "torch")
    train("torch", "torch from torch")
    train(TE, "TE from torch")
    for what, words in RECOMPUTED.items():
        train(TE, f"recomputed {what} from torch", *words)
    train("torch", "packed on torch from torch", *packed)
    train(TE, "packed on TE from torch", *packed)
    train(TE, "not packed from torch", *again)
    begin(TE, "TE")
    train(TE, "TE from TE")
    train("torch", "torch from TE")
    begin(TE, "in parts", "precision.recipe=bf16")
    for name in ("in parts", "whole"):
        train(TE, name, "precision.recipe=bf16")


def curve(folder: Path, name: str, last: int = 4) -> list[float]:
    """Losses and gradient norms, step by step."""
    records: list[dict[str, Any]] = runs.records(folder / name)
    assert records[-1]["iteration"] == last
    return [record[key] for record in records for key in ("loss", "grad_norm")]


def assert_goes_on(folder: Path, one: str, other: str) -> None:
    """Two runs from one checkpoint have the same curve, and end with the same state."""
    assert curve(folder, one) == pytest.approx(curve(folder, other), **SAME)
    a, b = tensors(folder, one), tensors(folder, other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6, msg=name)


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All of a run's last checkpoint: parameters and optimizer state."""
    with CheckpointReader(checkpoint(folder, name, 4)) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def test_goes_on_from_the_torch_backend(folder: Path) -> None:
    """Weights and the optimizer's state move to Transformer Engine."""
    assert_goes_on(folder, "TE from torch", "torch from torch")


def test_the_torch_backend_goes_on(folder: Path) -> None:
    """And back."""
    assert_goes_on(folder, "torch from TE", "TE from TE")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_rank(folder: Path, layout: str) -> None:
    assert_goes_on(folder, f"{layout} from torch", "TE from torch")


def test_packed_documents(folder: Path) -> None:
    """Attention and states stop at documents' borders on both backends."""
    packed, on_torch, whole = (
        curve(folder, f"{name} from torch", last=2)
        for name in ("packed on TE", "packed on torch", "not packed")
    )
    assert packed == pytest.approx(on_torch, **SAME)
    assert packed != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("what", RECOMPUTED)
def test_recomputed(folder: Path, what: str) -> None:
    """Forward passes within the backward pass are the same, to the bit."""
    assert curve(folder, f"recomputed {what} from torch") == curve(folder, "TE from torch")


def test_resumed_equals_unbroken(folder: Path) -> None:
    """In bf16, saved at the second step and started again: to the bit."""
    assert curve(folder, "in parts") == curve(folder, "whole")
    assert runs.same_tensors(tensors(folder, "in parts"), tensors(folder, "whole"))


def generated(folder: Path) -> str:
    """On a rank: what the first run's model says, on the backend of the device."""
    from megatron_hybrid.generation import Generator, SamplingParams

    torch.distributed.destroy_process_group()  # generation has one of its own
    with Generator(folder / "torch" / "checkpoints") as generator:
        [[completion]] = generator.generate(["1 2 3"], SamplingParams(max_new_tokens=12))
        assert completion.text is not None
        return completion.text


def test_generates_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the keys, values and states of the tokens before, and without a word beside it."""
    (text,) = run_on_gpus(generated, 1, folder)
    assert len(text.split()) == 12 and "Warning" not in capsys.readouterr().out
    assert run_distributed(generated, 1, folder) == [text]
