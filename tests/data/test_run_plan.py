"""From a config to plans: regions, caps, evaluations, and going on."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.run_plan import (
    check_epochs,
    open_run_sources,
    training_plan,
    validation_plan,
)
from megatron_hybrid.data.source import Source
from tests.data.conftest import write_corpus
from tests.data.planning import windows

Make = Callable[..., tuple[RunConfig, dict[str, Source]]]


@pytest.fixture
def make(tmp_path: Path, make_config: Callable[..., RunConfig]) -> Make:
    """Makes a config of phases over web (20,000 tokens) and code (5,000), and opens both."""
    for name, tokens in (("web", 20_000), ("code", 5000)):
        write_corpus(tmp_path / name, [range(100)] * (tokens // 100))

    def make(
        sources: dict[str, Any] | None = None, **data: Any
    ) -> tuple[RunConfig, dict[str, Source]]:
        fields = {name: {"path": str(tmp_path / name)} for name in ("web", "code")}
        for name, edits in (sources or {}).items():
            fields[name] |= edits
        default = {
            "sources": fields,
            "split": "90,9.5,0.5",
            "phases": [
                {"name": "one", "weights": {"web": 3, "code": 1}},
                {"name": "two", "start_fraction": 0.6, "weights": {"web": 1, "code": 1}},
            ],
        }
        training = {
            "train_iters": None,
            "train_tokens": 12_800,
            "eval_interval": 5,
            "eval_iters": 2,
        }
        config = make_config(default | data, **training)
        return config, open_run_sources(config, None)

    return make


def test_planning_needs_no_torch() -> None:
    """Planning and reading load neither torch nor the engine: `data plan` starts at once."""
    code = (
        "import sys, megatron_hybrid.data.run_plan, megatron_hybrid.data.planned_windows\n"
        "print([name for name in ('torch', 'megatron', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_a_plan_follows_its_config(make: Make) -> None:
    """Phases, weights, regions, fractions and blocks are those of the config; a source's own split
    goes before the general one."""
    config, opened = make(sources={"code": {"split": "50,50,0", "fraction": 0.5}}, block_tokens=64)
    plan = training_plan(config, opened)
    assert [(s.first_sample, s.end_sample) for s in plan.stretches] == [(0, 240), (240, 400)]
    assert [stretch.counts for stretch in plan.stretches] == [(180, 60), (80, 80)]
    web, code = plan.sources
    assert (web.name, web.tokens, web.begin, web.end, web.blocks) == ("web", 20_000, 0, 18_000, 281)
    assert (code.name, code.tokens, code.begin, code.end) == ("code", 5000, 0, 2500)
    assert (code.region_blocks, code.blocks) == (39, 20)


def test_data_path_is_one_phase_of_sources_named_by_prefix(make: Make, tmp_path: Path) -> None:
    """Megatron-LM's blend gives the same kind of plan."""
    prefixes = [str(tmp_path / name) for name in ("web", "code")]
    config, opened = make(phases=[], sources=None, data_path=[3, prefixes[0], 1, prefixes[1]])
    plan = training_plan(config, opened)
    assert [source.name for source in plan.sources] == prefixes
    assert [stretch.counts for stretch in plan.stretches] == [(300, 100)]


def test_evaluations_read_what_is_held_out(make: Make) -> None:
    """The samples of an evaluation lie in the second share of each source, none of which training
    reads, and are shared as the tokens of training are."""
    config, opened = make()
    plan = training_plan(config, opened)
    valid = validation_plan(config, opened, plan)
    assert valid.samples == 2 * 8
    assert [use.samples for use in valid.consumed(16)] == [10, 6]  # of 260 and 140 in training
    ends = {"web": 20_000, "code": 5000}
    for name, _, offset, length in windows(valid):
        assert ends[name] * 0.9 <= offset < offset + length + 1 <= ends[name] * 0.995
    for name, _, offset, length in windows(plan):
        assert offset + length + 1 <= ends[name] * 0.9


def test_a_source_without_a_sample_held_out_is_refused(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Every source that is trained on is evaluated on: too small a share is named; one that is read
    more than once is a warning; a source without a weight needs none."""
    config, opened = make(sources={"code": {"split": "99.5,0.5,0"}})
    with pytest.raises(DataError) as error:
        validation_plan(config, opened, training_plan(config, opened))
    assert str(error.value) == (
        "training.eval_interval=5: source code has 25 of its 5000 tokens to draw from "
        "(data.split), less than one sample of 32 and its last label; give it more text, another "
        "split or no weight"
    )
    only_web = [{"name": "one", "weights": {"web": 1, "code": 0}}]
    config, opened = make(sources={"code": {"split": "100,0,0"}}, phases=only_web)
    assert validation_plan(config, opened, training_plan(config, opened)).samples == 16
    config, opened = make(sources={"code": {"split": "98,2,0"}})
    with caplog.at_level(logging.WARNING):
        validation_plan(config, opened, training_plan(config, opened))
    assert [record.getMessage() for record in caplog.records] == [
        "every evaluation reads what is held out of source code 2.00 times"
    ]


def test_caps_name_source_phase_and_shortfall(make: Make) -> None:
    """More epochs than a source's own cap or the general one allow are refused, for all sources at
    once; exactly as many are not."""
    config, opened = make(max_epochs=0.45, sources={"code": {"max_epochs": 0.5}})
    plan = training_plan(config, opened)
    assert [use.samples for use in plan.consumed(plan.samples)] == [260, 140]
    with pytest.raises(DataError) as error:
        check_epochs(config, plan)
    # Epochs of 562 and 140 windows.
    assert str(error.value).splitlines() == [
        "data.max_epochs=0.45: the run reads source web 0.4626 times and passes the cap in phase "
        "two; of 17984 tokens an epoch, it lacks 228; lower its weight, shorten the run or raise "
        "the cap",
        "data.sources.code.max_epochs=0.5: the run reads source code 1 times and passes the cap in "
        "phase two; of 4480 tokens an epoch, it lacks 2240; lower its weight, shorten the run or "
        "raise the cap",
    ]
    config, opened = make(sources={"code": {"max_epochs": 1}})
    check_epochs(config, training_plan(config, opened))


def test_many_epochs_without_a_cap_are_a_warning(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """More than four passes are said, once for each source; a cap is the user's answer to it."""
    for data, warnings in (
        ({"sources": {"code": {"fraction": 0.2}}}, ["the run reads source code 5.00 times; "]),
        ({"sources": {"code": {"fraction": 0.2}}, "max_epochs": 5}, []),
    ):
        config, opened = make(**data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_epochs(config, training_plan(config, opened))
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [f"{text}data.max_epochs would set a limit" for text in warnings]


def test_a_weight_too_small_for_a_sample_is_a_warning(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A phase that weighs a source and reads none of it says so; the others do not."""
    phases = [{"name": "one", "weights": {"web": 1, "code": 1e-9}}]
    config, opened = make(phases=phases)
    with caplog.at_level(logging.WARNING):
        check_epochs(config, training_plan(config, opened))
    assert [record.getMessage() for record in caplog.records] == [
        "phase one reads no sample of source code: its weight is 1e-09 of the blend, and of 400 "
        "samples one is 0.0025"
    ]


def test_a_run_goes_on_with_the_blocks_it_began_with(make: Make) -> None:
    """An added phase of another length leaves the default blocks of what was read as they were;
    a length that they do not hold is refused, and so is another size of them."""
    config, opened = make()
    saved = Plan.from_json(training_plan(config, opened).to_json())
    phases = [phase.model_dump(exclude_none=True) for phase in config.data.phases]

    def go_on(**data: Any) -> Plan:
        config, opened = make(**data)
        return training_plan(config, opened, saved, consumed_samples=300)

    def third(seq_length: int) -> list[dict[str, Any]]:
        last = {"name": "three", "last_tokens": 1280, "weights": {"web": 1}}
        return [*phases, last | {"seq_length": seq_length}]

    plan = go_on(phases=third(16))
    assert {source.block_tokens for source in plan.sources} == {32}
    assert windows(plan, 300) == windows(saved, 300)
    assert np.unique(plan.locate(np.arange(plan.samples)).seq_lengths).tolist() == [16, 32]
    with pytest.raises(
        DataError, match="source web is cut into blocks of 32 tokens, which hold no"
    ):
        go_on(phases=third(64))
    with pytest.raises(DataError, match=r"data\.block_tokens=64 was 32 when source web was read"):
        go_on(block_tokens=64)
