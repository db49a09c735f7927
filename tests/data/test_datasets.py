"""What a run reads, as a whole: training and evaluation apart, batches that follow the schedule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.datasets import RunData, open_windows, plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE, SavedPlan, read_saved_plan
from megatron_hybrid.data.shard import open_shard
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.data.windows import Windows
from tests.data.conftest import VOCAB_SIZE, write_corpus

MakeConfig = Callable[..., RunConfig]
TOKENIZER = build_tokenizer("null", None, vocab_size=VOCAB_SIZE)


def all_windows(windows: Windows | None, length: int) -> np.ndarray:
    assert windows is not None
    return windows.__getitems__(range(length))


@pytest.fixture
def blend(tmp_path: Path) -> list[list[object]]:
    """Two sources whose tokens tell where they are: 0 … 399, and 500 … 899, ten of each."""
    return [
        [weight, write_corpus(tmp_path / name, [[first + i // 10 for i in range(4000)]])]
        for name, first, weight in (("a", 0, 3), ("b", 500, 1))
    ]


def opened(config: RunConfig) -> tuple[RunData, Windows, Windows | None]:
    data = plan_data(config, TOKENIZER, None)
    return data, *open_windows(config, TOKENIZER, data)


def test_evaluations_read_what_is_held_out(blend: object, make_config: MakeConfig) -> None:
    """Every evaluation has the same samples, which no step of training reads, in its shares."""
    options = {"eval_interval": 5, "eval_iters": 2, "train_iters": 20}
    config = make_config({"data_path": blend, "split": "80,20,0"}, **options)
    data, train, valid = opened(config)
    assert data.valid_steps is not None
    assert (data.steps.samples, data.valid_steps.samples) == (160, 16)
    trained, held_out = all_windows(train, 160), all_windows(valid, 16)
    assert {int(token) % 500 < 320 for token in trained.flat} == {True}
    assert {int(token) % 500 >= 320 for token in held_out.flat} == {True}
    assert (held_out[:, 0] < 500).sum() == 12
    assert (all_windows(opened(config)[2], 16) == held_out).all()
    assert opened(make_config({"data_path": blend}))[2] is None


def test_length_and_batches_follow_the_config(blend: object, make_config: MakeConfig) -> None:
    """Made-up tokens and plans alike: steps grow by schedule, and reach the tokens asked for."""
    for data in ({"mock_data": True}, {"data_path": blend}):
        config = make_config(
            data, train_iters=None, train_tokens=2000, batch_size_schedule=[[600, 16]]
        )
        run = plan_data(config, TOKENIZER, None)
        sizes, sample = [], 0
        while sample < run.steps.samples:
            sizes.append(run.steps.batch_size(sample))
            sample += sizes[-1]
        assert sizes == [8, 8, 8, 16, 16, 16]
        assert run.steps.tokens == 32 * sum(sizes)


def test_mock_splits_differ(make_config: MakeConfig) -> None:
    """mock_data needs no file, and its validation samples are not its training samples."""
    _, train, valid = opened(make_config({"mock_data": True}, eval_interval=5))
    assert (all_windows(train, 80) != all_windows(valid, 80)).any(axis=1).all()


def test_saved_plans_come_back(blend: object, make_config: MakeConfig, tmp_path: Path) -> None:
    """What is written into a checkpoint is read back whole; a folder without one has none."""
    plan = plan_data(make_config({"data_path": blend}), TOKENIZER, None).plan
    assert plan is not None
    assert read_saved_plan(tmp_path) is None
    (tmp_path / DATA_PLAN_FILE).write_text(SavedPlan(plan, 24).to_json())
    assert read_saved_plan(tmp_path) == SavedPlan(plan, 24)


def test_plans_from_before_some_bytes_were_part_of_a_digest(
    blend: list[list[object]], make_config: MakeConfig
) -> None:
    """Their files are the same still; a file that was made anew is not, where its plan tells."""
    config = make_config({"data_path": blend})
    plan = plan_data(config, TOKENIZER, None).plan
    assert plan is not None
    older = [
        replace(source, shards=(open_shard(Path(source.name)).older_digest,))
        for source in plan.sources
    ]
    assert all(a.shards != b.shards for a, b in zip(older, plan.sources, strict=True))
    saved = SavedPlan(replace(plan, sources=tuple(older)), 24)
    assert plan_data(config, TOKENIZER, saved).plan == saved.plan
    path = Path(f"{blend[0][1]}.bin")
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DataError, match="1 of its 1 files hold other tokens than before"):
        plan_data(config, TOKENIZER, SavedPlan(plan, 24))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"consumed_samples": 24', '"consumed_samples": -1'),
        ('"consumed_samples": 24', '"consumed_samples": 81'),
        ('"consumed_samples": 24', '"consumed_samples": "24"'),
        ('"consumed_samples": 24,', ""),
        ('"seed"', '"sead"'),
        ("}", ""),
    ],
)
def test_damaged_plans_are_refused(
    old: str, new: str, blend: object, make_config: MakeConfig, tmp_path: Path
) -> None:
    """A plan that cannot be the one that was written is an error with its file's name."""
    plan = plan_data(make_config({"data_path": blend}), TOKENIZER, None).plan
    assert plan is not None
    text = SavedPlan(plan, 24).to_json()
    assert old in text
    (tmp_path / DATA_PLAN_FILE).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=f"{DATA_PLAN_FILE} is damaged"):
        read_saved_plan(tmp_path)
