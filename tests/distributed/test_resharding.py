"""A checkpoint of one layout goes on in any other: the same losses as if never interrupted."""

from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    AHEAD,
    GLOBAL_BATCH_SIZE,
    HEADS,
    LAYOUTS,
    MOE,
    ONE_RANK,
    SEQ_LENGTH,
    UNLIKE,
    VOCAB_SIZE,
    Layout,
    batches_of_this_rank,
    built,
    layout_config,
)

BEFORE, AFTER = 2, 2
LAYOUT = {layout.name: layout for layout in (ONE_RANK, *LAYOUTS)}


# The vocabulary's padding, where it is not that of the checkpoint: none, and whole ranks.
PADDINGS = {"one rank": 1, "TP2+SP": 512}


def _config(layout: Layout, save: Path, layers: str, multiple: int | None = None) -> Any:
    config = layout_config(layout, layers, packed=False, recompute=False)
    if multiple is not None:
        padded = config.model.model_copy(update={"make_vocab_size_divisible_by": multiple})
        config = config.model_copy(update={"model": padded})
    # A larger rate than elsewhere: an optimizer state that went wrong must show.
    optimizer = config.optimizer.model_copy(update={"lr": 1e-3})
    checkpoint = config.checkpoint.model_copy(update={"save": save})
    return config.model_copy(update={"checkpoint": checkpoint, "optimizer": optimizer})


def train_and_save(layout: Layout, save: Path, layers: str = MOE) -> list[float]:
    """On a rank: train, save, train on; the losses after the save."""
    from megatron_hybrid.checkpoint.progress import Progress
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.training.checkpoint import Checkpointer
    from megatron_hybrid.training.step import BatchShape

    config = _config(layout, save, layers)
    shape = BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    with built(config) as (model, optimizer, stepper):
        data = batches_of_this_rank(packed=False)
        for _ in range(BEFORE):
            stepper.train(data, shape, float("inf"), [])
        reports: list[str] = []
        checkpointer = Checkpointer(
            config,
            model,
            optimizer,
            NullTokenizer(VOCAB_SIZE),
            lambda _, line: reports.append(line),
        )
        checkpointer.save(Progress(BEFORE, BEFORE * config.training.global_batch_size))
        assert reports
        return [stepper.train(data, shape, float("inf"), []).loss for _ in range(AFTER)]


def load_and_train(
    layout: Layout, save: Path, layers: str = MOE, multiple: int | None = None
) -> list[float]:
    """On a rank: load, skip the data that was seen, train; the losses."""
    from megatron_hybrid.checkpoint.files import latest_checkpoint
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    config = _config(layout, save, layers, multiple)
    shape = BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    with built(config) as (model, optimizer, stepper):
        folder = latest_checkpoint(save)
        assert folder is not None
        progress = load_checkpoint(config, folder, model, optimizer, weights_only=False)
        assert progress.iteration == BEFORE
        data = batches_of_this_rank(packed=False)
        share = config.training.global_batch_size // _data_parallel_size()
        for _ in range(BEFORE * share):
            next(data)
        return [stepper.train(data, shape, float("inf"), []).loss for _ in range(AFTER)]


def _data_parallel_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


@pytest.fixture(scope="module")
def saved_by_tp2_pp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Checkpoints of a TP2xPP2 run, and the losses of its steps after the save."""
    save = tmp_path_factory.mktemp("saved")
    return save, run_distributed(train_and_save, 4, LAYOUT["TP2xPP2"], save)[0]


@pytest.mark.parametrize(
    "name", ["one rank", "TP2+SP", "PP2xVPP2", "CP2", "DP2", "EP2", "TP2xPP2", "DP2xEP2"]
)
def test_loss_goes_on(name: str, saved_by_tp2_pp2: tuple[Path, list[float]]) -> None:
    """What TP2xPP2 saved (weights, optimizer) goes on in every layout, in some with another padding
    of the vocabulary, to 1e-5 of the loss.
    """
    save, expected = saved_by_tp2_pp2
    multiple = PADDINGS.get(name)
    losses = run_distributed(load_and_train, LAYOUT[name].ranks, LAYOUT[name], save, MOE, multiple)[
        0
    ]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layers", [UNLIKE, HEADS, AHEAD], ids=["unlike", "heads", "ahead"])
def test_unlike_layers_go_on(layers: str, tmp_path: Path) -> None:
    """Layers of unlike sizes, saved by two stages, go on where each of them is shared; so do those
    with attention and Mamba-2 side by side.
    """
    expected = run_distributed(train_and_save, 2, LAYOUT["PP2"], tmp_path, layers)[0]
    losses = run_distributed(load_and_train, 2, LAYOUT["TP2+SP"], tmp_path, layers)[0]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"), [("DP2xEP2", MOE), ("TP2xPP2", "MEM*")], ids=["EP", "one stage's MoE"]
)
def test_same_layout_goes_on_bit_for_bit(name: str, layers: str, tmp_path: Path) -> None:
    """Saved and loaded by the same layout, the losses are the very same numbers; also where only
    one pipeline stage has experts, and with them an optimizer that the other has not.
    """
    layout = LAYOUT[name]
    expected = run_distributed(train_and_save, layout.ranks, layout, tmp_path, layers)[0]
    assert run_distributed(load_and_train, layout.ranks, layout, tmp_path, layers)[0] == expected
