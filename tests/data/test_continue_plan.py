"""Edits of a plan in mid-run: the past stays sample by sample, what comes repeats nothing, and an
edit of the past is refused with its field."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_hybrid.config.phases import Phase
from megatron_hybrid.data.continue_plan import continue_plan
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.layout import make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.proportions import share_out
from megatron_hybrid.data.stream import PlannedSource
from tests.data import planning
from tests.data.planning import check_inside, check_no_repeats, source, windows


@st.composite
def _edits(
    draw: st.DrawFn, plan: Plan, consumed: int, sources: Sequence[PlannedSource], turn: int
) -> tuple[list[Phase], list[PlannedSource]]:
    """Phases and sources that keep the past: another end, other later phases, a new source."""
    tokens = sum(use.tokens for use in plan.consumed(consumed))
    begun = [
        number
        for number in range(len(plan.phases))
        if any(s.phase == number and s.first_sample < consumed for s in plan.stretches)
    ]
    past = list(plan.phases[: begun[-1] + 1])
    block_tokens = min(each.block_tokens for each in sources)
    lengths = [length for length in planning.SEQ_LENGTHS if length <= block_tokens]
    added = (
        draw(planning.sources(block_tokens, prefix=f"new{turn}-")) if draw(st.booleans()) else []
    )
    everything = draw(st.permutations([*sources, *added]))
    end = max(past[-1].end_tokens, tokens) if draw(st.booleans()) else tokens
    past[-1] = replace(past[-1], end_tokens=end + draw(st.sampled_from([0, 0, 1, 100, 999])))
    later: list[Phase] = []
    if draw(st.booleans()):
        names = [each.name for each in everything]
        later = draw(planning.phases_from(past[-1].end_tokens, names, 7 * 32, lengths))
    return [*past, *later], everything


@settings(max_examples=50)
@given(declared=planning.declarations(), data=st.data())
def test_edits_in_mid_run_keep_the_past_and_repeat_nothing(declared: Any, data: Any) -> None:
    """A run that is edited three times, at any samples: what was read stays, streams go on, and
    over the whole run no text repeats within an epoch."""
    phases, sources, sizes, seed = declared
    plan = make_plan(phases, sources, sizes, seed)
    consumed, past = 0, []
    for turn in range(3):
        consumed = data.draw(st.integers(consumed, plan.samples))
        past = windows(plan, consumed)
        if consumed:
            phases, sources = data.draw(_edits(plan, consumed, sources, turn))
        sizes = ((0, data.draw(st.integers(1, 7))),)
        try:
            plan = continue_plan(plan, consumed, phases, sources, sizes, seed)
        except DataError as error:
            # A phase may be too short for a batch of the new size.
            assume("holds no global batch" not in str(error))
            raise
        plan = Plan.from_json(plan.to_json())
        assert windows(plan, consumed) == past
        assert plan.tokens >= phases[-1].end_tokens
    read = windows(plan)
    check_inside(plan, read)
    check_no_repeats(read)


@settings(max_examples=60)
@given(declared=planning.declarations(), data=st.data())
def test_going_on_without_an_edit_changes_nothing(declared: Any, data: Any) -> None:
    """The same declaration, with any batch sizes and sources in any order, gives the same samples
    to the end."""
    phases, sources, sizes, seed = declared
    plan = make_plan(phases, sources, sizes, seed)
    consumed = data.draw(st.integers(1, plan.samples))
    again = continue_plan(
        plan, consumed, phases, data.draw(st.permutations(sources)), [(0, 5)], seed
    )
    assert windows(again) == windows(plan)


WEB, CODE = source("web", 4000, 8), source("code", 4000, 8)
BLEND = {"web": 0.75, "code": 0.25}
LATER = {"web": 0.5, "code": 0.5}
PHASES = (Phase("one", 0, 800, BLEND, 8), Phase("two", 800, 1600, LATER, 8))
SIZES = ((0, 4),)
PLAN = make_plan(PHASES, [WEB, CODE], SIZES, seed=1)


def test_a_later_phase_may_change_and_the_current_one_stays_as_planned() -> None:
    """With phase two edited in phase one, phase one is read to its end as it was planned."""
    edited = (PHASES[0], replace(PHASES[1], weights={"code": 1.0}, seq_length=4))
    plan = continue_plan(PLAN, 40, edited, [WEB, CODE], SIZES, 1)
    assert windows(plan, 100) == windows(PLAN, 100)
    assert {(name, length) for name, _, _, length in windows(plan)[100:]} == {("code", 4)}


def test_a_new_phase_cuts_the_current_one_where_the_run_stands() -> None:
    """A phase put in between takes over at the next global batch before its start; each source
    goes on with the window after the last that it gave."""
    math = source("math", 4000, 8)
    blend = {"web": 0.5, "math": 0.5}
    edited = (
        replace(PHASES[0], end_tokens=480),
        Phase("between", 480, 800, blend, 8),
        PHASES[1],
    )
    plan = continue_plan(PLAN, 40, edited, [WEB, CODE, math], SIZES, 1)
    assert [(s.phase, s.first_sample, s.end_sample) for s in plan.stretches] == [
        (0, 0, 40),
        (0, 40, 60),
        (1, 60, 100),
        (2, 100, 200),
    ]
    assert windows(plan, 40) == windows(PLAN, 40)
    assert share_out([0.75, 0.25], 20) == list(plan.stretches[1].counts[:2])
    only_web = make_plan([Phase("all", 0, 4000, {"web": 1.0}, 8)], [WEB], SIZES, 1)
    read = [window for window in windows(plan) if window[0] == "web"]
    assert read == windows(only_web, len(read))


def test_a_longer_run_goes_on_where_the_shorter_one_ended() -> None:
    """A finished run that is given more tokens reads on, whatever it read stays."""
    edited = (PHASES[0], replace(PHASES[1], end_tokens=2400))
    plan = continue_plan(PLAN, PLAN.samples, edited, [WEB, CODE], SIZES, 1)
    assert plan.samples == 300
    assert windows(plan, 200) == windows(PLAN)
    check_no_repeats(windows(plan))


def test_before_the_first_sample_all_may_change() -> None:
    """With nothing read, the plan is made anew."""
    phases, sources = [Phase("x", 0, 100, {"other": 1.0}, 16)], [source("other", 999, 16)]
    plan = continue_plan(PLAN, 0, phases, sources, SIZES, seed=9)
    assert plan == make_plan(phases, sources, SIZES, 9)


def test_a_source_that_was_not_read_may_change_or_go() -> None:
    """Only what has been read is fixed."""
    phases = (replace(PHASES[0], weights={"web": 1.0}), PHASES[1])
    plan = make_plan(phases, [WEB, CODE], SIZES, 1)
    other = source("code", 5000, 16, begin=100, fraction=0.5)
    edited = continue_plan(plan, 50, phases, [WEB, other], SIZES, 1)
    check_inside(edited, windows(edited))
    assert windows(edited, 50) == windows(plan, 50)
    alone = (phases[0], replace(PHASES[1], weights={"web": 1.0}))
    assert [each.name for each in continue_plan(plan, 50, alone, [WEB], SIZES, 1).sources] == [
        "web"
    ]


def _refusal(
    phases: Sequence[Phase] = PHASES,
    sources: Sequence[PlannedSource] = (WEB, CODE),
    consumed: int = 120,
    seed: int = 1,
    from_data_path: bool = False,
) -> list[str]:
    with pytest.raises(DataError) as error:
        continue_plan(PLAN, consumed, phases, sources, SIZES, seed, from_data_path)
    head, *problems = str(error.value).splitlines()
    assert head == (
        f"{consumed} samples ({consumed * 8} tokens) have been read with this plan; what was read "
        "stays as it was:"
    )
    return problems


@pytest.mark.parametrize(
    ("phases", "consumed", "problems"),
    [
        (
            (PHASES[0], replace(PHASES[1], weights={"web": 0.6, "code": 0.4})),
            120,
            [
                "data.phases[1].weights.web is 0.6 of the blend and was 0.5; for another blend "
                "from here on, add a phase that starts at 960 tokens or later",
                "data.phases[1].weights.code is 0.4 of the blend and was 0.5; for another blend "
                "from here on, add a phase that starts at 960 tokens or later",
            ],
        ),
        (
            (replace(PHASES[0], end_tokens=720), replace(PHASES[1], start_tokens=720)),
            120,
            [
                "data.phases[1] starts at 720 tokens; it started at 800. start_fraction and "
                "last_tokens go by the length of the run; in place of them, "
                "data.phases[1].start_tokens=800 keeps it where it was"
            ],
        ),
        (
            (replace(PHASES[0], seq_length=4), PHASES[1]),
            120,
            ["data.phases[0].seq_length=4 was 8"],
        ),
        (
            (replace(PHASES[0], end_tokens=1600),),
            120,
            ["data.phases[1] (two) has begun and is gone"],
        ),
        (
            (replace(PHASES[0], end_tokens=160), replace(PHASES[1], start_tokens=160)),
            40,
            ["data.phases[1] starts at 160 tokens; allowed: 320 and more"],
        ),
        (
            (PHASES[0], replace(PHASES[1], end_tokens=900)),
            120,
            ["the run ends at 900 tokens; allowed: 960 and more"],
        ),
    ],
)
def test_edits_of_past_phases_are_refused(
    phases: Sequence[Phase], consumed: int, problems: list[str]
) -> None:
    """Each change of a phase that has begun is named with its field, what it is and what it was."""
    assert _refusal(phases, consumed=consumed) == problems


@pytest.mark.parametrize(
    ("web", "problem"),
    [
        (
            source("web", 4400, 8, shards=("web:4000", "new:400")),
            "data.sources.web.path has 4400 tokens in 2 files; it had 4000 in 1; new files can be "
            "a source of their own",
        ),
        (
            replace(WEB, shards=("other",)),
            "data.sources.web.path: 1 of its 1 files hold other tokens than before",
        ),
        (
            replace(WEB, end=3600),
            "data.sources.web.split (or data.split) leaves tokens 0 to 3600 of source web to train "
            "on; they were 0 to 4000",
        ),
        (replace(WEB, fraction=0.5), "data.sources.web.fraction=0.5 was 1"),
        (
            replace(WEB, block_tokens=16),
            "data.block_tokens=16 was 8 when source web was read",
        ),
    ],
)
def test_edits_of_sources_that_were_read_are_refused(web: PlannedSource, problem: str) -> None:
    """Other files, another split, fraction or block of a source that has been read."""
    assert _refusal(sources=[web, CODE]) == [problem]


def test_all_edits_are_named_at_once() -> None:
    """The seed, a phase and two sources; one of them is there under another name."""
    phases = (PHASES[0], replace(PHASES[1], weights={"crawl": 0.5, "code": 0.5}))
    crawl = replace(WEB, name="crawl")
    assert _refusal(phases, [replace(CODE, fraction=0.5), crawl], seed=2) == [
        "training.seed=2 was 1",
        "data.phases[1].weights.web is 0 of the blend and was 0.5; for another blend from here on, "
        "add a phase that starts at 960 tokens or later",
        "data.phases[1].weights.crawl is 0.5 of the blend and was 0; for another blend from here "
        "on, add a phase that starts at 960 tokens or later",
        "source web has been read and is gone; crawl has its files, and under another name they "
        "would be read again",
        "data.sources.code.fraction=0.5 was 1",
    ]


def test_fields_are_those_of_data_path_where_that_was_written() -> None:
    """A config without phases and sources is answered in its own words."""
    phases = (PHASES[0], replace(PHASES[1], weights={"web": 0.6, "code": 0.4}, seq_length=4))
    problems = _refusal(
        phases, [replace(WEB, end=3600), replace(CODE, shards=("other",))], from_data_path=True
    )
    assert [problem.split(" is ")[0].split(" leaves")[0] for problem in problems] == [
        "data.seq_length=4 was 8",
        "data.data_path: the weight of web",
        "data.data_path: the weight of code",
        "data.split",
        "data.data_path: code: 1 of its 1 files hold other tokens than before",
    ]
