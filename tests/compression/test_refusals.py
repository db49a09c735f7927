"""`compress prune`: what cannot be done is refused at once, every reason with its numbers."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.cli import main
from megatron_hybrid.compression.scores import Scores, fingerprint_of, shapes
from megatron_hybrid.testing import run_distributed
from tests.compression.models import parent_of, parent_words
from tests.training.runs import words
from tests.upcycling.models import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent for TP2 and PP2, and score files that are not of it."""
    folder = tmp_path_factory.mktemp("refused")
    run_distributed(train, 1, parent_words(folder / "run"))
    source, config = parent_of(folder / "run")
    values = {name: torch.ones(shape) for name, shape in shapes(config.model).items()}
    with CheckpointReader(source) as reader:
        own = fingerprint_of(reader)
    Scores(values, "0" * 64, {"checkpoint": "elsewhere"}).save(folder / "other")
    Scores(values, own, {}).save(folder / "whole")
    Scores(
        values | {"hidden": torch.ones(5), "depth": torch.full((6,), float("nan"))}, own, {}
    ).save(folder / "short")
    (folder / "damaged").write_bytes((folder / "whole").read_bytes()[:50])
    (folder / "text").write_text("hidden: 1")
    return folder


# What is typed beside the run and --save, and what is said.
TYPED = {
    "": ["nothing is asked; allowed: --num-layers"],
    "--hidden-size 24": ["--hidden-size 24: nothing says which of them stay; allowed: --scores"],
    "--num-layers 4": ["--num-layers 4 of 6 needs to know which are the least important"],
    "--num-layers 7 --keep first": ["--num-layers 7 must be at most the model's 6; allowed"],
    "--num-layers 4 --drop-layers 1": ["--num-layers 4 with --drop-layers 1: they say the same"],
    "--drop-layers 2,9": ["--drop-layers 9: the model has 6 layers; allowed: 1 to 6"],
    "--drop-layers 1-6": ["--drop-layers 1, 2, 3, 4, 5, 6 takes all layers of model.hybrid"],
    "--hidden-size 40 --keep first": ["--hidden-size 40 must be at most model.hidden_size=32"],
    "--ffn-hidden-size 49 --keep first": [
        "--ffn-hidden-size 49 must be at most layer 2's model.ffn_hidden_size=48; allowed: 1 to 48"
    ],
    "--mamba-num-heads 3 --keep first": [
        "--mamba-num-heads=3 must be a multiple of model.mamba_num_groups=2; allowed: 2, 4, 6"
    ],
    "--num-attention-heads 3 --keep first": [
        "--num-attention-heads=3 must be a multiple of model.num_query_groups=2"
    ],
    "--num-moe-experts 1 --keep first": [
        "--num-moe-experts 1 must be at least model.moe_router_topk=2; allowed: 2 to 4"
    ],
    "--layers 3:ffn_hidden_size=8 --keep first": [
        "--layers 3:ffn_hidden_size=8: layer 3 is attention, and not MLP"
    ],
    "--layers 9:ffn_hidden_size=8 --keep first": ["9:ffn_hidden_size=8: the model has 6 layers"],
    "--layers 2:ffn_hidden_size=8 --drop-layers 2 --keep first": [
        "--layers 2:ffn_hidden_size=8: --drop-layers takes layer 2 away"
    ],
    "--hidden-size 24 --scores {}/whole --keep first": ["--scores with --keep first"],
    "--hidden-size 24 --scores {}/none": ["none cannot be read: there is no such file"],
    "--hidden-size 24 --scores {}/other": [
        "is of another checkpoint (elsewhere): its weights have the fingerprint"
    ],
    "--hidden-size 24 --scores {}/short": [
        "hidden has the shape (5,); it must have (32,)", "depth holds what is no finite number"
    ],
    "--hidden-size 24 --scores {}/damaged": ["damaged is damaged:"],
    "--hidden-size 24 --scores {}/text": ["text is damaged:"],
    "--drop-layers 1 model.hidden_size=16": [
        "model.hidden_size=16 cannot be set here: the options decide it"
    ],
    "--drop-layers 1 checkpoint.finetune=true": ["checkpoint.finetune=True cannot be set here"],
    "--mamba-num-heads 2 --keep first parallel.tensor_model_parallel_size=4": [
        "model.mamba_num_heads=2", "parallel.tensor_model_parallel_size=4"
    ],
    "--hidden-size 99 --mamba-num-heads 1 --num-moe-experts 9": [  # all at once
        "--hidden-size 99 must", "--mamba-num-heads=1 must", "--num-moe-experts 9 must",
        "nothing says which",
    ],
}  # fmt: skip
# What is no option's value at all: 2, and a line.
MISTYPED = {
    "--drop-layers 2-1": "'2-1' is not like 2,4,10-20",
    "--layers 2:ffn_size=8": "'ffn_size' is no size that is cut",
    "--layers ffn_hidden_size=8": "is not like 10-20:ffn_hidden_size=96",
    "--layers 2:ffn_hidden_size=x": "is not like ffn_hidden_size=96",
    "--hidden-size 0": "greater than or equal to 1",
}


@pytest.fixture
def refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[str, int], str]:
    """What the command says where it ends with a code; nothing is written."""

    def run(typed: str, code: int) -> str:
        words = ["compress", "prune", str(folder / "run"), "--save", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["megatron-hybrid", *words, *typed.format(folder).split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


@pytest.mark.parametrize("typed", TYPED)
def test_is_refused(typed: str, refused: Callable[[str, int], str]) -> None:
    """Before any work, in one message."""
    said = refused(typed, 1)
    for text in TYPED[typed]:
        assert text in said


@pytest.mark.parametrize("typed", MISTYPED)
def test_is_mistyped(typed: str, refused: Callable[[str, int], str]) -> None:
    """A usage error."""
    assert MISTYPED[typed] in refused(typed, 2)


def test_a_place_that_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What is there stays there."""
    words = ["compress", "prune", str(folder / "run"), "--save", str(folder), "--drop-layers", "2"]
    monkeypatch.setattr(sys, "argv", ["megatron-hybrid", *words])
    with pytest.raises(SystemExit):
        main()
    assert "give a folder that is empty or not there" in capsys.readouterr().err
    assert find_checkpoint(folder / "run").is_dir()


def test_of_several_stages_and_kinds(tmp_path: Path) -> None:
    """A whole pipeline segment, layers whose keys others reuse, and kinds that are not cut."""
    from megatron_hybrid.compression.request import Request, problems
    from megatron_hybrid.config import load_config, rules
    from megatron_hybrid.config.model import ModelConfig

    def model(*more: str) -> ModelConfig:
        return load_config([*parent_words(tmp_path), *more], which=rules.MODEL).model

    def said(model: ModelConfig, request: Request) -> str:
        return "\n".join(problems(model, request, scored=False, keep_first=True))

    staged = model("model.hybrid_layer_pattern=M-|*E|M-")
    text = said(staged, Request(drop_layers=(1, 3, 4)))
    assert "takes all layers of pipeline segment 2 of 3 of model.hybrid_layer_pattern" in text
    reuse = load_config(
        words(tmp_path, "model.hybrid_layer_pattern=HHM-", "model.parallel_heads_join=mean",
              "model.mamba_version=1",
              "model.layers={2: {reuse_kv: true}}"), which=rules.MODEL,
    ).model  # fmt: skip
    assert "--drop-layers 1: layer 2 reuses its keys and values" in said(
        reuse, Request(drop_layers=(1,))
    )
    assert "--hidden-size 16: layer 1 is parallel heads" in said(reuse, Request(hidden_size=16))
    other = said(reuse, Request(sizes={"num_moe_experts": 2}))
    assert "--num-moe-experts 2: the model has no MoE layers" in other
    groups = model("model.moe_router_num_groups=2", "model.moe_router_group_topk=1")
    assert "experts of groups are not cut yet; allowed: 4" in said(
        groups, Request(sizes={"num_moe_experts": 2})
    )
