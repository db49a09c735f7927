"""megatron-core's order: weights, splits, files that changed or were cut, and several ranks."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_hybrid.claim import CLAIM_FILE, claimed
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data import megatron_order
from megatron_hybrid.data.datasets import open_windows, other_passes, plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.data.windows import Windows
from tests.data.conftest import EOD, VOCAB_SIZE, write_corpus

MakeConfig = Callable[..., RunConfig]


def datasets(config: RunConfig) -> tuple[Windows | None, Windows | None]:
    """The windows of a config in megatron-core's order, unless it asks for made-up tokens."""
    data = config.data.model_copy(update={"sample_order": "megatron"})
    config = config.model_copy(update={"data": data})
    tokenizer = build_tokenizer("null", None, vocab_size=VOCAB_SIZE)
    return open_windows(config, tokenizer, plan_data(config, tokenizer, None))


def corpus(prefix: Path, first_id: int, documents: int = 100) -> str:
    """Document k holds the id first_id + k, forty times, and the document end."""
    return write_corpus(prefix, [[first_id + k] * 40 + [EOD] for k in range(documents)])


def _all(windows: Windows | None) -> list[NDArray[np.int64]]:
    assert windows is not None
    return list(windows.__getitems__(range(len(windows))))


def ids(windows: Windows) -> set[int]:
    return {int(token) for window in _all(windows) for token in window} - {EOD}


def test_weights(tmp_path: Path, make_config: MakeConfig) -> None:
    """At every point of the run each source is within two samples of its weight."""
    blend = [[3, corpus(tmp_path / "a", 0)], [7, corpus(tmp_path / "b", 500)]]
    train, valid = datasets(make_config({"data_path": blend}, train_iters=50))
    assert train is not None and valid is None
    assert len(train) == 400
    from_b = np.cumsum([window.min() >= 500 for window in _all(train)])
    assert np.abs(from_b - 0.7 * np.arange(1, 401)).max() <= 2


def test_many_small_weights(tmp_path: Path, make_config: MakeConfig) -> None:
    """A short run over one large and many small sources builds: rounding is provided for.

    Each small source is drawn from at least once, so the engine's blend holds 23 samples instead
    of 8, and 12 of them come from the large source, which was to give 4.
    """
    five_samples = [[1] * (5 * 32 + 1)]
    blend = [[19, write_corpus(tmp_path / "large", five_samples)]]
    blend += [[1, corpus(tmp_path / f"small_{i}", 40 * (i + 1), 30)] for i in range(19)]
    train, _ = datasets(make_config({"data_path": blend, "split": "1,0,0"}, train_iters=1))
    assert len(_all(train)) == 8


def test_splits_share_no_document(tmp_path: Path, make_config: MakeConfig) -> None:
    """Training and validation draw from their own documents, and leave the test's."""
    data = {"data_path": [[1, corpus(tmp_path / "a", 0)]], "split": "80,10,10"}
    train, valid = datasets(make_config(data, eval_interval=5, eval_iters=2, train_iters=20))
    assert train is not None and valid is not None
    assert (len(train), len(valid)) == (160, 16)
    assert ids(train) <= set(range(80))
    assert ids(valid) <= set(range(80, 90))
    only_train, _ = datasets(make_config(data, train_iters=20))
    assert only_train is not None
    assert all((a == b).all() for a, b in zip(_all(only_train), _all(train), strict=True))


def test_data_made_anew_is_read_anew(tmp_path: Path, make_config: MakeConfig) -> None:
    """Indices of a corpus that was replaced under the same name are not used for the new one."""
    config = make_config({"data_path": corpus(tmp_path / "a", 0)})
    datasets(config)
    write_corpus(tmp_path / "a", [[7] * 5 + [EOD]] * 400)
    train, _ = datasets(config)
    assert train is not None and ids(train) == {7}


def test_half_built_indices_are_built_again(tmp_path: Path, make_config: MakeConfig) -> None:
    """A run killed while it wrote its indices does not break the next; whole ones are kept."""
    config = make_config({"data_path": corpus(tmp_path / "a", 0)})
    train, _ = datasets(config)
    assert train is not None
    expected = [window.tolist() for window in _all(train)]
    (index,) = (config.run_dir / "data_cache").rglob("*-shuffle_index.npy")
    written = index.stat().st_mtime_ns
    datasets(config)
    assert index.stat().st_mtime_ns == written
    (index.parent / "complete").unlink()
    index.write_bytes(b"")
    again, _ = datasets(config)
    assert [window.tolist() for window in _all(again)] == expected


def test_a_living_run_builds_them_for_others(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that share a cache: the second waits, and removes nothing that the first is at."""
    config = make_config({"data_path": corpus(tmp_path / "a", 0)})
    datasets(config)
    (index,) = (config.run_dir / "data_cache").rglob("*-shuffle_index.npy")
    mark, whole = index.parent / "complete", index.read_bytes()
    mark.unlink()
    index.write_bytes(b"half")
    looks = []

    def look(seconds: float) -> None:
        looks.append(index.read_bytes())
        if len(looks) == 3:  # the other is done
            index.write_bytes(whole)
            mark.touch()

    claim = index.parent.with_name(f".{index.parent.name}{CLAIM_FILE}")
    with claimed([claim], "another run"):
        monkeypatch.setattr(megatron_order.time, "sleep", look)
        train, _ = datasets(config)
    assert looks == [b"half"] * 3
    assert train is not None and len(_all(train)) == len(train)


@pytest.mark.parametrize("others", [[], [[1, "b"]]], ids=["one source", "a blend"])
def test_a_longer_run_that_begins_otherwise_is_told(
    others: list[list[Any]], tmp_path: Path, make_config: MakeConfig
) -> None:
    """Of runs that differ in length alone, those that are called alike begin with the same samples,
    and the others do not: the engine is asked."""
    blend = [[1, corpus(tmp_path / "a", 0)]]
    blend += [[weight, corpus(tmp_path / name, 500)] for weight, name in others]
    runs = []
    for steps in (10, 12, 15, 20, 25, 30, 40):
        run = make_config({"data_path": blend, "split": "1,0,0"}, train_iters=steps)
        train, _ = datasets(run)
        runs.append((run, _all(train)[:80]))
    alike = []
    for (one, first), (other, second) in pairwise(runs):
        told = other_passes(other, one)
        assert (not told) == all((a == b).all() for a, b in zip(first, second, strict=True)), told
        alike.append(not told)
    assert 2 <= sum(alike) < len(alike)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data_path": "nowhere/a"}, "cannot read nowhere/a.idx: No such file"),
        ({}, "data.data_path is empty"),
        ({"split": "9,x"}, "data.split=9,x must be up to three numbers"),
        ({"split": "0,1,1"}, "data.split=0,1,1 leaves nothing to train on"),
        ({"split": "1,0,0"}, "data.split=1,0,0 leaves nothing for valid of the 100 documents"),
    ],
)
def test_unusable(
    data: dict[str, object], message: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    """What cannot be blended is refused with the field and its value, before the engine hangs."""
    path = {"data_path": corpus(tmp_path / "a", 0)} if "split" in data else {}
    with pytest.raises(DataError, match=message):
        datasets(make_config(path | data, eval_interval=5))


def test_mock_splits_differ(make_config: MakeConfig) -> None:
    """mock_data needs no file, and its validation samples are not its training samples."""
    train, valid = datasets(make_config({"mock_data": True}, eval_interval=5))
    assert train is not None and valid is not None
    assert (len(train), len(valid)) == (80, 80)
    assert (_all(train)[0] != _all(valid)[0]).any()


def _build(values: dict[str, object]) -> list[list[int]]:
    return [window.tolist() for window in _all(datasets(RunConfig.model_validate(values))[0])]


def test_ranks_agree(tmp_path: Path, make_config: MakeConfig) -> None:
    """Two ranks read the same windows as one."""
    from megatron_hybrid.testing import run_distributed

    blend = [[3, corpus(tmp_path / "a", 0)], [7, corpus(tmp_path / "b", 500)]]
    config = make_config({"data_path": blend})
    expected = [window.tolist() for window in _all(datasets(config)[0])]
    values = config.model_dump(mode="json")
    fresh = values | {"run_dir": str(tmp_path / "ranks")}
    assert run_distributed(_build, 2, fresh) == [expected, expected]
