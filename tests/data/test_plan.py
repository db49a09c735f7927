"""A plan: any sample from a few hundred numbers, exact counts, no repeats, nothing lost on the way
through text."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.config.phases import Phase, normalised
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.layout import default_block_tokens, make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.proportions import share_out
from tests.data.planning import check_inside, check_no_repeats, declarations, source, windows

Declared = tuple[list[Phase], list[Any], tuple[tuple[int, int], ...], int]


@settings(max_examples=60)
@given(declared=declarations())
def test_samples_are_windows_and_none_repeats(declared: Declared) -> None:
    """Each sample is one window inside its source's region; no text repeats within an epoch of a
    source, across phases and sequence lengths."""
    plan = make_plan(*declared)
    read = windows(plan)
    check_inside(plan, read)
    check_no_repeats(read)


@settings(max_examples=60)
@given(declared=declarations())
def test_counts_of_a_phase_are_exact_and_evenly_spread(declared: Declared) -> None:
    """Each phase has its sequence length and its weights to the sample, and no prefix of it strays
    from them by more than 3 samples."""
    phases, sources, *_ = declared
    plan = make_plan(*declared)
    for phase, use in zip(phases, plan.table(), strict=True):
        count = use.end_sample - use.first_sample
        weights = np.array([phase.weights.get(each.name, 0.0) for each in sources])
        taken = [each.samples for each in use.sources]
        assert taken == share_out(weights.tolist(), count)
        drawn, _, lengths = plan.locate(np.arange(use.first_sample, use.end_sample))
        assert set(lengths.tolist()) == {phase.seq_length}
        assert np.bincount(drawn, minlength=len(sources)).tolist() == taken
        seen = np.cumsum(drawn[:, None] == np.arange(len(sources)), axis=0)
        due = np.arange(1, count + 1)[:, None] * weights
        assert np.abs(seen - due).max() <= 3


@settings(max_examples=40)
@given(declared=declarations(), data=st.data())
def test_consumption_equals_counting(declared: Declared, data: st.DataObject) -> None:
    """What each source has given by any sample, in closed form, is what counting gives."""
    plan = make_plan(*declared)
    sample = data.draw(st.integers(0, plan.samples))
    read = windows(plan, sample)
    samples = Counter(name for name, *_ in read)
    tokens: Counter[str] = Counter()
    for name, _, _, length in read:
        tokens[name] += length
    for use in plan.consumed(sample):
        assert (use.samples, use.tokens) == (samples[use.name], tokens[use.name])


@settings(max_examples=40)
@given(declared=declarations())
def test_text_gives_the_same_plan(declared: Declared) -> None:
    """A plan that has been through JSON is equal, and so are its samples."""
    plan = make_plan(*declared)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    samples = np.arange(plan.samples)
    for here, there in zip(plan.locate(samples), again.locate(samples), strict=True):
        assert np.array_equal(here, there)


@settings(max_examples=40)
@given(declared=declarations(), data=st.data())
def test_a_sample_does_not_depend_on_what_is_asked_with_it(
    declared: Declared, data: st.DataObject
) -> None:
    """Samples looked up alone, in any order or with repeats are those looked up together."""
    plan = make_plan(*declared)
    together = plan.locate(np.arange(plan.samples))
    asked = data.draw(st.lists(st.integers(0, plan.samples - 1), max_size=30))
    for all_of_it, some in zip(together, plan.locate(asked), strict=True):
        assert np.array_equal(all_of_it[np.array(asked, dtype=np.int64)], some)


def test_20_000_windows_of_two_lengths_do_not_repeat() -> None:
    """Two phases of 4096 then 8192 tokens over sources that are read one to three times."""
    rng = np.random.default_rng(0)
    lengths, phase_samples = (4096, 8192), 10_000
    names = ["web", "code", "math", "wiki"]
    blends = [normalised(dict(zip(names, rng.random(4).tolist(), strict=True))) for _ in lengths]
    tokens = [
        sum(
            blend[name] * length * phase_samples
            for blend, length in zip(blends, lengths, strict=True)
        )
        for name in names
    ]
    sources = [
        source(name, int(total / passes), default_block_tokens(lengths))
        for name, total, passes in zip(names, tokens, (0.9, 1.3, 2.2, 2.9), strict=True)
    ]
    middle, end = 4096 * phase_samples, (4096 + 8192) * phase_samples
    phases = [
        Phase("one", 0, middle, blends[0], 4096),
        Phase("two", middle, end, blends[1], 8192),
    ]
    plan = make_plan(phases, sources, [(0, 8)], seed=3)
    assert plan.samples == 2 * phase_samples
    read = windows(plan)
    check_no_repeats(read)
    # Nor is text left out: what an epoch skips where the length changes is a 64th and no more.
    for each in sources:
        first = {offset for name, epoch, offset, _ in read if name == each.name and epoch == 0}
        if any(name == each.name and epoch == 1 for name, epoch, *_ in read):
            assert len({offset // 8192 for offset in first}) >= each.blocks * 63 // 64


def test_a_phase_begins_and_ends_with_whole_global_batches() -> None:
    """A phase holds the batches that fit before its end, the last one those that reach it; the
    batch size changes where the schedule says."""
    sources = [source("web", 10**6, 8)]
    blend = {"web": 1.0}
    phases = [Phase("one", 0, 1000, blend, 8), Phase("two", 1000, 2001, blend, 4)]
    uses = make_plan(phases, sources, [(0, 16), (500, 32)], seed=0).table()
    # 128 tokens a batch up to 512, then 256: 768 tokens; then 128 a batch.
    assert [(use.first_sample, use.end_sample) for use in uses] == [(0, 96), (96, 416)]
    assert [(use.start_tokens, use.end_tokens) for use in uses] == [(0, 768), (768, 2048)]


def test_the_order_of_a_source_does_not_depend_on_the_length_of_the_run() -> None:
    """A longer run, or another blend, reads the same windows of a source in the same order."""
    sources = [source("web", 5000, 8), source("code", 300, 8)]

    def order(end: int, web: float) -> list[tuple[str, int]]:
        plan = make_plan(
            [Phase("all", 0, end, {"web": web, "code": 1 - web}, 8)], sources, [(0, 4)], 7
        )
        return [(name, offset) for name, _, offset, _ in windows(plan) if name == "code"]

    short, long, leaner = order(1000, 0.5), order(3000, 0.5), order(3000, 0.75)
    assert long[: len(short)] == short
    assert long[: len(leaner)] == leaner


def test_plans_of_a_run_are_the_same_for_ever() -> None:
    """Runs in progress depend on these numbers: a change would repeat and skip their data."""
    sources = [source("web", 2000, 24), source("code", 500, 24, fraction=0.5)]
    blend = {"web": 0.7, "code": 0.3}
    phases = [Phase("one", 0, 96, blend, 8), Phase("two", 96, 240, blend, 12)]
    plan = make_plan(phases, sources, [(0, 3)], seed=1234)
    assert [place.tolist() for place in plan.locate(np.arange(plan.samples))] == [
        [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0],
        [
            648,
            248,
            656,
            664,
            240,
            272,
            280,
            256,
            264,
            1544,
            0,
            1552,
            48,
            132,
            60,
            816,
            120,
            828,
            1956,
            288,
            1944,
            1152,
            300,
            1164,
        ],
        [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12, 12],
    ]


def test_what_the_sources_do_not_have_is_refused_at_once() -> None:
    """All sources too small for their phases are named with the numbers and what would help; one
    without a weight may be as small as it likes."""
    sources = [
        source("tiny", 100, 96, end=40),
        source("small", 100, 96, end=90),
        source("coarse", 1000, 24),
        source("unread", 3, 96),
    ]
    blend = normalised({"tiny": 1, "small": 1, "coarse": 1})
    with pytest.raises(DataError) as error:
        make_plan([Phase("all", 0, 1000, blend, 48)], sources, [(0, 1)], 0)
    assert str(error.value).splitlines() == [
        "source tiny has 40 of its 100 tokens to draw from (data.split), less than one sample of "
        "48 and its last label; give it more text, another split or no weight",
        "source small has 90 of its 100 tokens to draw from (data.split), less than one block of "
        "96 and its last label; allowed: data.block_tokens=48 to 89",
        "source coarse is cut into blocks of 24 tokens, which hold no sample of 48; "
        "data.block_tokens, set when a run begins, must be at least the longest seq_length",
    ]


def test_phases_without_a_global_batch_are_refused() -> None:
    """Phases too short for one batch are named with the numbers; the last is never too short."""
    blend = {"web": 1.0}
    phases = [
        Phase("one", 0, 100, blend, 8),
        Phase("two", 100, 400, blend, 8),
        Phase("three", 400, 410, blend, 8),
        Phase("four", 410, 411, blend, 8),
    ]
    with pytest.raises(DataError) as error:
        make_plan(phases, [source("web", 10**4, 8)], [(0, 16)], 0)
    assert str(error.value).splitlines() == [
        "data.phases[0] (one) holds no global batch: 16 samples of 8 tokens are 128, and it has "
        "100, from 0 (where the batches before it end) to 100",
        "data.phases[2] (three) holds no global batch: 16 samples of 8 tokens are 128, and it has "
        "26, from 384 (where the batches before it end) to 410",
    ]


@pytest.mark.parametrize(
    ("lengths", "block_tokens"),
    [([4096], 4096), ([4096, 8192], 8192), ([8192, 512, 4096], 8192), ([96, 64], 192),
     ([1000, 1001], 16 * 1001)],
)  # fmt: skip
def test_default_blocks(lengths: list[int], block_tokens: int) -> None:
    """Blocks that every length fills, unless these would be longer than 16 of the longest."""
    assert default_block_tokens(lengths) == block_tokens


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content | {"version": 2},
        lambda content: content | {"stretches": [{"phase": 0}]},
        lambda content: content | {"sources": None},
        lambda content: {key: value for key, value in content.items() if key != "seed"},
        lambda content: [content],
    ],
)
def test_text_that_is_no_plan_is_refused(edit: Any) -> None:
    """Another version, a missing or broken part: an error for the user."""
    plan = make_plan([Phase("all", 0, 100, {"web": 1.0}, 8)], [source("web", 999, 8)], [(0, 1)], 0)
    with pytest.raises(DataError, match="not a data plan of version 1"):
        Plan.from_json(json.dumps(edit(json.loads(plan.to_json()))))
    with pytest.raises(DataError, match="not a data plan of version 1"):
        Plan.from_json(plan.to_json()[:-20])


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every number in a JSON value."""
    if isinstance(value, int | float):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, (*path, key))


def test_every_number_of_a_plan_may_be_wrong() -> None:
    """Each one changed: refused as no plan, or a plan whose every sample lies in its source."""
    phases = [
        Phase("one", 0, 48, {"web": 1.0, "code": 2.0}, 8),
        Phase("two", 48, 96, {"web": 1}, 8),
    ]
    sources = [source("web", 999, 8), source("code", 99, 8)]
    content = json.loads(make_plan(phases, sources, [(0, 2)], 0).to_json())
    paths = [path for path in _numbers(content) if path[0] in ("sources", "stretches")]
    assert len(paths) > 15
    for path in paths:
        for wrong in (-1, 0, 1, 0.5, 10**6):
            changed = json.loads(json.dumps(content))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = wrong
            try:
                plan = Plan.from_json(json.dumps(changed))
            except DataError:
                continue
            places = plan.locate(np.arange(plan.samples))
            ends = np.array([each.end for each in plan.sources])[places.sources]
            assert (places.offsets + places.seq_lengths < ends).all(), path
            plan.consumed(plan.samples)
            plan.table()
