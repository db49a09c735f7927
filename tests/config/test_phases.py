"""Sources, phases and batch sizes: how a config says them, and what they come to."""

import math
import pickle
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hybrid.config import (
    PhaseConfig,
    RunConfig,
    SourceConfig,
    batch_sizes,
    build_config,
    load_config,
    phases,
    rules,
    run_tokens,
    sources,
)
from megatron_hybrid.config.phases import normalised
from megatron_hybrid.config.yaml_text import dump_yaml, parse_yaml
from megatron_hybrid.errors import ConfigError
from tests.config import GOOD

THREE_PHASES: dict[str, Any] = {
    "preset": "tiny",
    "data": {
        "sources": {
            "web": {"path": "d/web"},
            "crawl++": {"path": ["d/c_0", "d/c_1"], "max_epochs": 4, "split": "9,1,0"},
            "math": {"path": "d/math_*", "fraction": 0.5},
        },
        "phases": [
            {"name": "start", "weights": {"web": 6, "crawl++": 4, "math": 0}},
            {"name": "middle", "start_fraction": 0.6, "weights": {"web": 1, "math": 1}},
            {"name": "end", "last_tokens": 2e5, "seq_length": 512, "weights": {"math": 0.1}},
        ],
    },
    "training": {"train_tokens": 1e6, "batch_size_schedule": [[3e5, 32], [7e5, 64]]},
}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(THREE_PHASES), encoding="utf-8")
    return str(path)


def load(file: str, *typed: str) -> RunConfig:
    return load_config([file, *typed], which=rules.NO_FILES)


def test_phases_of_a_file(file: str) -> None:
    """Boundaries of each kind become tokens; weights are normalised, and none is 0."""
    config = load(file)
    start, middle, end = phases(config)
    assert [phase.name for phase in (start, middle, end)] == ["start", "middle", "end"]
    spans = [(phase.start_tokens, phase.end_tokens) for phase in (start, middle, end)]
    assert spans == [(0, 600_000), (600_000, 800_000), (800_000, 1_000_000)]
    assert start.weights == {"web": 0.6, "crawl++": 0.4}
    assert middle.weights == {"web": 0.5, "math": 0.5}
    assert end.weights == {"math": 1.0}
    assert [start.seq_length, end.seq_length] == [256, 512]
    assert batch_sizes(config) == ((0, 16), (300_000, 32), (700_000, 64))
    assert list(sources(config)) == ["web", "crawl++", "math"]
    assert sources(config)["web"].path == ("d/web",)
    assert sources(config)["crawl++"] == SourceConfig(
        path=("d/c_0", "d/c_1"), max_epochs=4, split="9,1,0"
    )


def test_a_blend_is_one_phase() -> None:
    """Megatron-LM's --data-path: a source a prefix, named as typed, and one phase to the end."""
    config = load_config(
        ["tiny", "--data-path", "3", "d/a", "1", "d/b", "--train-samples", "100"],
        which=rules.NO_FILES,
    )
    [phase] = phases(config)
    assert (phase.name, phase.start_tokens, phase.end_tokens) == ("all", 0, 100 * 256)
    assert phase.weights == {"d/a": 0.75, "d/b": 0.25}
    assert {name: source.path for name, source in sources(config).items()} == {
        "d/a": ("d/a",),
        "d/b": ("d/b",),
    }


def test_made_up_tokens_are_one_phase() -> None:
    """Without sources there is still a run, of one phase of no source."""
    config = load_config(GOOD)
    assert sources(config) == {}
    [phase] = phases(config)
    assert (phase.end_tokens, phase.weights) == (run_tokens(config), {})
    assert run_tokens(config) == 240 * 16 * 256


def test_fractions_are_those_that_were_written() -> None:
    """0.57 of 10**14 tokens is 57 * 10**12, which the float 0.57 is just below."""
    assert math.floor(Fraction(0.57) * 10**14) != 57 * 10**12
    values = deepcopy(THREE_PHASES)
    values["data"]["phases"][1]["start_fraction"] = 0.57
    values["training"] = {"train_tokens": 10**14, "train_iters": None}
    config = with_preset(values)
    assert phases(config)[1].start_tokens == 57 * 10**12


def with_preset(values: dict[str, Any]) -> RunConfig:
    """A config of plain values over the smallest preset."""
    base = load_config(["tiny"], which=rules.NO_FILES).model_dump(mode="json")
    merged = base | {
        name: base[name] | inner for name, inner in values.items() if isinstance(inner, dict)
    }
    return build_config(merged, which=rules.NO_FILES)


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(10**7, 10**14),
    cuts=st.lists(st.integers(1, 998), min_size=0, max_size=5, unique=True).map(sorted),
    kinds=st.lists(st.sampled_from(["fraction", "tokens", "last"]), min_size=5, max_size=5),
    weights=st.lists(
        st.dictionaries(st.sampled_from("abcd"), st.floats(0, 1e6), min_size=1).filter(
            lambda blend: any(blend.values())
        ),
        min_size=6,
        max_size=6,
    ),
)
def test_phases_fill_the_run(
    total: int, cuts: Sequence[int], kinds: list[str], weights: list[dict[str, float]]
) -> None:
    """However starts are said, phases adjoin from 0 to the end, and their weights sum to 1."""
    starts: list[dict[str, object]] = [{}]
    for cut, kind in zip(cuts, kinds, strict=False):
        tokens = math.floor(Fraction(cut, 999) * total)
        said = {"tokens": {"start_tokens": tokens}, "last": {"last_tokens": total - tokens}}
        starts.append(said.get(kind, {"start_fraction": cut / 1000}))
    config = load_config(GOOD)
    data = config.data.model_copy(
        update={
            "phases": tuple(
                PhaseConfig.model_validate({"name": f"p{n}", "weights": blend} | start)
                for n, (blend, start) in enumerate(zip(weights, starts, strict=False))
            )
        }
    )
    training = config.training.model_copy(update={"train_iters": None, "train_tokens": total})
    found = phases(config.model_copy(update={"data": data, "training": training}))
    assert found[0].start_tokens == 0 and found[-1].end_tokens == total
    for before, after in pairwise(found):
        assert before.end_tokens == after.start_tokens
    for phase, blend in zip(found, weights, strict=False):
        assert sum(phase.weights.values()) == pytest.approx(1)
        assert set(phase.weights) <= {name for name, weight in blend.items() if weight}


OVERRIDES = [
    ("data.sources.web.max_epochs=2", "sources.web.max_epochs", 2.0),
    ("data.sources.web.max_epochs=null", "sources.web.max_epochs", None),
    ("data.sources.crawl++.path=d/x_*", "sources.crawl++.path", ("d/x_*",)),
    ("data.sources.web.path=[d/x, d/y]", "sources.web.path", ("d/x", "d/y")),
    ("data.sources.new.path=d/new", "sources.new", SourceConfig(path=("d/new",))),
    ("data.sources.math.split=1,1,1", "sources.math.split", "1,1,1"),
    ("data.phases[1].seq_length=1024", "phases.1.seq_length", 1024),
    ("data.phases[0].weights.web=0.5", "phases.0.weights.web", 0.5),
    ("data.phases[0].weights={web: 1}", "phases.0.weights", {"web": 1.0}),
    ("data.phases[1].start_tokens=5e5", "phases.1.start_tokens", 500_000),
    ("data.phases[1].start_tokens=5e5", "phases.1.start_fraction", None),
    ("data.phases[2].name=last", "phases.2.name", "last"),
    (
        'data.phases=[{"name": "only", "weights": {"web": 1}}]',
        "phases",
        (PhaseConfig(name="only", weights={"web": 1}),),
    ),
    ("--phases [{name: only, weights: {web: 1}}]", "phases.0.name", "only"),
    ("--max-epochs 8", "max_epochs", 8.0),
]


@pytest.mark.parametrize(("typed", "place", "value"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_words_reach_into_sources_and_phases(
    file: str, typed: str, place: str, value: object
) -> None:
    """A dotted word changes one place of the file; everything else stays."""
    words = typed.split(" ", 1) if typed.startswith("--") else [typed]
    found: Any = load(file, *words).data
    for part in place.split("."):
        is_item = part.isdigit()
        key: Any = int(part) if is_item else part
        found = found[key] if is_item or isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_words_are_taken_in_their_order(file: str) -> None:
    """A whole value takes back what was typed inside it before, and is changed by what comes after;
    of two words for one place the later stands."""
    whole = "data.phases=[{name: only, weights: {web: 1}}]"
    inside = "data.phases[0].seq_length=512"
    assert load(file, inside, whole).data.phases[0].seq_length is None
    assert load(file, whole, inside).data.phases[0].seq_length == 512
    assert load(file, inside, "data.phases[0].seq_length=1024").data.phases[0].seq_length == 1024


def test_blend_and_sources_replace_each_other(file: str, tmp_path: Path) -> None:
    """A typed --data-path takes the place of a file's sources and phases, and they of it."""
    config = load(file, "--data-path", "d/a", "training.batch_size_schedule=null")
    assert config.data.data_path == ((1.0, "d/a"),)
    assert (config.data.sources, config.data.phases) == ({}, ())
    blend = tmp_path / "blend.yaml"
    blend.write_text("preset: tiny\ndata: {data_path: d/a}\n", encoding="utf-8")
    typed = ["data.sources={b: {path: d/b}}", "data.phases=[{name: all, weights: {b: 1}}]"]
    config = load(str(blend), *typed)
    assert config.data.data_path == ()
    assert list(config.data.sources) == ["b"]


def test_a_stored_config_takes_words_inside(file: str, tmp_path: Path) -> None:
    """A resolved config reads back equal, and words change it as they change the original."""
    config = load(file)
    stored = tmp_path / "stored.yaml"
    stored.write_text(config.to_yaml(), encoding="utf-8")
    assert load(str(stored)) == config
    word = "data.phases[2].weights.web=0.3"
    assert load(str(stored), word) == load(file, word)


def test_a_config_is_frozen_to_its_depths(file: str) -> None:
    """Nothing in it can be changed; it can be hashed, copied and sent to another process."""
    config = load(file)
    with pytest.raises(TypeError, match="cannot be changed"):
        config.data.sources["x"] = SourceConfig(path=("x",))
    with pytest.raises(TypeError, match="cannot be changed"):
        config.data.phases[0].weights.update({"web": 1.0})
    with pytest.raises(TypeError, match="cannot be changed"):
        del config.data.sources["web"]
    assert hash(config) == hash(load(file))
    assert pickle.loads(pickle.dumps(config)) == deepcopy(config) == config


def test_a_source_may_wait_for_a_phase_to_come(file: str) -> None:
    """A source that no phase weighs is no mistake: an edit in mid-run may bring it in."""
    assert "later" in load(file, "data.sources.later.path=d/later").data.sources


def test_every_problem_at_once(file: str) -> None:
    """A bad value in one phase hides no other, and nothing that breaks rules across fields."""
    words = ["data.phases[0].weights.web=-1", "data.phases[1].weights.maths=1", "--max-epochs", "0"]
    with pytest.raises(ConfigError) as caught:
        load(file, *words, "data.sources.web.fractoin=0.5", "data.sources.math.fraction=2")
    assert caught.value.problems == [
        "data.sources.web.fractoin is not a field; did you mean data.sources.web.fraction?",
        "data.sources.math.fraction=2 must be a number above 0 and of at most 1",
        "data.phases[0].weights.web=-1 must be a number of at least 0",
        "data.max_epochs=0 must be a number above 0, or null",
        "data.phases[1].weights.maths names no source of data.sources; did you mean math?",
    ]


leaf = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**13)
    | st.floats()
    | st.text("a.[]=*~ b1", max_size=4)
)
keys = st.sampled_from([*SourceConfig.model_fields, *PhaseConfig.model_fields, "web", "x.y", 1])
junk = st.recursive(
    leaf, lambda part: st.lists(part, max_size=3) | st.dictionaries(keys, part, max_size=4)
)


@settings(max_examples=60, deadline=None)
@given(source=junk, phase=junk, schedule=junk, nested=st.booleans())
def test_junk_is_refused_in_words(source: Any, phase: Any, schedule: Any, nested: bool) -> None:
    """Whatever stands in the place of sources, phases and batch sizes, problems are sentences."""
    values = load_config(["tiny"], which=rules.NO_FILES).model_dump(mode="json")
    values["data"]["sources"] = {"web": source} if nested else source
    values["data"]["phases"] = [phase, phase] if nested else phase
    values["training"] |= {"batch_size_schedule": schedule, "train_tokens": 10**6}
    with pytest.raises(ConfigError) as caught:  # two lengths are set, at the least
        build_config(values, which=rules.NO_FILES)
    assert all(isinstance(problem, str) for problem in caught.value.problems)


names = st.text("abcXYZ019_-+é", min_size=1, max_size=6)
paths = st.text(
    st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12
) | st.sampled_from(["null", "~", "true", "1e5", "*", "[a]", "a: b", "# x"])


@settings(max_examples=30, deadline=None)
@given(
    blends=st.lists(
        st.dictionaries(names, st.floats(0, 1e9), min_size=1, max_size=3).filter(
            lambda blend: any(blend.values())
        ),
        min_size=1,
        max_size=3,
    ),
    paths=st.lists(paths, min_size=9, max_size=9, unique=True),
    cap=st.none() | st.floats(1e-3, 1e3),
    schedule=st.lists(st.integers(1, 10**13), max_size=3, unique=True).map(sorted),
)
def test_phases_survive_yaml(
    blends: list[dict[str, float]], paths: list[str], cap: float | None, schedule: list[int]
) -> None:
    """Whatever the names, paths and numbers, the YAML of a config reads back to an equal one."""
    named = dict.fromkeys(name for blend in blends for name in blend)
    data = {
        "sources": {
            name: SourceConfig(path=(path,), max_epochs=cap)
            for name, path in zip(named, paths, strict=False)
        },
        "phases": tuple(
            PhaseConfig(name=f"p{n}", weights=blend, start_tokens=n * 10**6 if n else None)
            for n, blend in enumerate(blends)
        ),
    }
    base = load_config(["tiny"], which=rules.NO_FILES)
    training = {
        "train_iters": None,
        "train_tokens": 10**14,
        "batch_size_schedule": tuple((tokens, 32) for tokens in schedule),
    }
    config = base.model_copy(
        update={
            "data": base.data.model_copy(update=data),
            "training": base.training.model_copy(update=training),
        }
    )
    assert build_config(parse_yaml(config.to_yaml()), which=()) == config


def test_weights_whose_sum_is_no_float() -> None:
    """Only the ratio of weights counts, whatever their size."""
    assert normalised({"web": 1e308, "code": 1e308, "math": 0.0}) == {"web": 0.5, "code": 0.5}
