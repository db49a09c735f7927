"""The windows of a plan, read from files: the right tokens, however they are asked for."""

import pickle

import numpy as np
import pytest

from megatron_hybrid.config.phases import Phase
from megatron_hybrid.data import planned_windows
from megatron_hybrid.data.layout import make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.planned_windows import PlannedWindows
from megatron_hybrid.data.source import Source, open_sources
from megatron_hybrid.data.tokenizer import NullTokenizer
from tests.data.conftest import write_corpus
from tests.data.planning import source as planned_source


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Plan, dict[str, Source], dict[str, np.ndarray]]:
    """A plan of two lengths over two sources, of which one has three shards of both types; the
    sources, and all their ids."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    ids: dict[str, list[np.ndarray]] = {"web": [], "code": []}
    for name, shard, tokens, vocab in [
        ("web", 0, 700, 1000), ("web", 1, 333, 100_000), ("web", 2, 500, 1000),
        ("code", 0, 600, 100_000),
    ]:  # fmt: skip
        ids[name].append(rng.integers(0, vocab, tokens))
        write_corpus(folder / f"{name}-{shard}", [ids[name][-1].tolist()], vocab)
    sources = open_sources({name: [f"{folder}/{name}-*"] for name in ids})
    planned = [planned_source(name, sources[name].tokens, 16) for name in ids]
    phases = [
        Phase("one", 0, 960, {"web": 0.7, "code": 0.3}, 16),
        Phase("two", 960, 1920, {"web": 0.4, "code": 0.6}, 8),
    ]
    plan = make_plan(phases, planned, [(0, 4)], seed=5)
    return plan, sources, {name: np.concatenate(parts) for name, parts in ids.items()}


def _windows(plan: Plan, sources: dict[str, Source]) -> PlannedWindows:
    return PlannedWindows(plan, sources, NullTokenizer(100_000))


def test_each_window_is_its_tokens_and_one_more(
    run: tuple[Plan, dict[str, Source], dict[str, np.ndarray]],
) -> None:
    """Every sample of the plan is the stretch of its source's ids that the plan says, with the
    label after it, as int64."""
    plan, sources, ids = run
    dataset = _windows(plan, sources)
    assert (len(dataset), dataset.vocab_size, dataset.eod) == (180, 100_000, 99_999)
    for sample in range(len(dataset)):
        (number,), (offset,), (length,) = plan.locate([sample])
        window = dataset.__getitems__([sample])
        assert (window.dtype, window.shape) == (np.int64, (1, plan.seq_length_at(sample) + 1))
        expected = ids[plan.sources[number].name][offset : offset + length + 1]
        assert np.array_equal(window[0], expected)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_windows_do_not_depend_on_how_they_are_asked_for(
    run: tuple[Plan, dict[str, Source], dict[str, np.ndarray]],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, in any order, in micro-batches of any size, from a copy in another process, and
    however many places are looked up at once: the same windows."""
    plan, sources, _ = run
    monkeypatch.setattr(planned_windows, "_CHUNK", chunk)
    dataset = _windows(plan, sources)
    rng = np.random.default_rng(chunk)
    copy = pickle.loads(pickle.dumps(dataset))
    for samples in (range(60), range(60, 180)):
        whole = dataset.__getitems__(list(samples))
        order = rng.permutation(len(samples))
        for rows in np.array_split(order, 13):
            asked = [samples[row] for row in rows]
            assert np.array_equal(_windows(plan, sources).__getitems__(asked), whole[rows])
            assert np.array_equal(copy.__getitems__(asked), whole[rows])
