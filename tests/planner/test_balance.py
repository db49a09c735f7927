"""Balanced splits: as good as the best of all where that can be told, never worse than even."""

import json
import random
from pathlib import Path
from types import MappingProxyType

import pytest

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.layers import sort_of_each
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.errors import UserError
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.planner.balance import Balancer
from megatron_hybrid.planner.costs import Cost, Costs, costs_json, read_costs
from megatron_hybrid.planner.generation import generation_memory
from megatron_hybrid.planner.hardware import GPUS
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.search import predicted_costs
from megatron_hybrid.planner.step_time import step_time

# Milliseconds of a layer of each kind, of the order that `plan --measure` finds on a CPU.
MEASURED = Costs(
    MappingProxyType(
        {
            "M": Cost(9.8, 24.1), "*": Cost(6.1, 14.9), "-": Cost(7.6, 15.2), "E": Cost(12.3, 27.5),
            "embedding": Cost(0.3, 0.9), "output": Cost(21.0, 43.0),
        }
    )
)  # fmt: skip


def some_costs(draws: random.Random) -> Costs:
    names = ("M", "*", "-", "E", "embedding", "output")
    return Costs(
        MappingProxyType(
            {name: Cost(f := draws.uniform(0.1, 5), f * draws.uniform(1.5, 3)) for name in names}
        )
    )


def some_layers(draws: random.Random, count: int) -> str:
    return "".join(draws.choice("MM*--E") for _ in range(count))


CASES = [(4, 1, 12), (8, 1, 13), (4, 2, 12), (2, 3, 11), (16, 1, 18), (8, 2, 18)]


@pytest.mark.parametrize(("stages", "chunks", "count"), CASES)
def test_the_search_finds_the_best(stages: int, chunks: int, count: int) -> None:
    """For random patterns and costs, and the measured ones: the time of the best of all splits."""
    draws = random.Random(stages * 100 + chunks)
    for costs in (MEASURED, *(some_costs(draws) for _ in range(3))):
        each = Balancer(some_layers(draws, count), costs, stages, chunks, 2 * stages, 0.1)
        best = each.exhaustive()
        assert each.searched().step_ms == pytest.approx(best.step_ms, rel=0.005)
        assert best.step_ms <= each.even().step_ms
        assert "".join(best.segments) == each.layers


@pytest.mark.parametrize(("stages", "chunks"), [(4, 1), (8, 1), (16, 1), (4, 3), (8, 2)])
def test_long_patterns(stages: int, chunks: int) -> None:
    """Nemotron-H 56B's layers: a pattern that a config takes, faster than the even split."""
    layers = "M-M-M-M*-" + 9 * "M-M-M-M-M*-" + "M-M-M-M-M-"
    balancer = Balancer(layers, MEASURED, stages, chunks, 4 * stages)
    found, even = balancer.best(), balancer.even()
    assert parse_pattern(found.pattern).segments == found.segments
    assert len(found.segments) == stages * chunks
    assert found.step_ms < even.step_ms
    assert found.bubble < even.bubble


def test_an_expensive_end_gets_fewer_layers() -> None:
    """A vocabulary that costs as much as three layers takes their place on the last stage."""
    costs = Costs(MappingProxyType({"M": Cost(1, 2), "output": Cost(3, 6)}))
    found = Balancer("M" * 13, costs, 4, 1, 64).best()
    assert found.pattern == "MMMM|MMMM|MMMM|M"
    assert found.bubble == pytest.approx(1 - 64 / 67)


def test_costs_in_a_file(tmp_path: Path) -> None:
    """They come back as written; what is wrong or missing is named, all at once."""
    path = tmp_path / "costs.json"
    path.write_text(costs_json(MEASURED))
    assert read_costs(path, "M*-E") == MEASURED
    path.write_text(json.dumps({"X": {}, "M": {"forward_ms": -1, "backward_ms": 2}}))
    with pytest.raises(UserError) as caught:
        read_costs(path, "M*")
    for text in ("'X' is no layer", "'*' is missing", "'M' must have forward_ms and backward_ms"):
        assert text in str(caught.value)
    for strange in (float("nan"), 1e400, True, "1", 1e-300, None):
        cost = {"forward_ms": strange, "backward_ms": 2}
        path.write_text(json.dumps({"M": cost}))
        with pytest.raises(UserError, match=r"'M' must have .*, numbers from 0 to 1e\+08"):
            read_costs(path, "M")
    for costs in ({}, {"M": {"forward_ms": 0, "backward_ms": 0}}):
        path.write_text(json.dumps(costs))
        with pytest.raises(UserError, match="all milliseconds are 0"):
            read_costs(path, "".join(costs))
    path.write_text("[")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_costs(path, "M")


RUN = (
    "tiny", "--mock-data", "--tokenizer-type", "null", "--vocab-size", "4096",
    "--global-batch-size", "16", "--pipeline-model-parallel-size", "2",
)  # fmt: skip


def planned(config: RunConfig) -> tuple[object, ...]:
    """All that the planner says of a run of two stages."""
    return (
        rank_memory(config, 2, fused=True), rank_memory(config, 2, fused=False),
        step_time(config, 2, GPUS["h100"]), predicted_costs(config, 2, GPUS["h100"]),
        generation_memory(config.model, 1024, 3), count_parameters(config.model).total,
    )  # fmt: skip


def test_sizes_count_whoever_says_them() -> None:
    """Said of each kind by `model.layers` or by the model, they are planned alike."""
    own = {
        "M": "mamba_num_heads=4 mamba_state_dim=16", "-": "ffn_hidden_size=256",
        "*": "num_query_groups=1 window_size=[64,0] position_embedding_type=rope",
        "E": "num_moe_experts=8 moe_ffn_hidden_size=64 moe_router_topk=3",
    }  # fmt: skip
    of_model = [f"model.{word}" for words in own.values() for word in words.split()]
    of_kinds = [f"model.layers.{k}.{word}" for k, words in own.items() for word in words.split()]
    alike, said = (load_config([*RUN, *words], world_size=2) for words in (of_model, of_kinds))
    assert planned(alike) == planned(said)
    assert planned(alike) != planned(load_config(RUN, world_size=2))


def test_unlike_layers_are_cut_by_their_own_costs(tmp_path: Path) -> None:
    """One MLP that is as wide as seven others stands alone where those are together."""
    words = (
        "nemotron_h_8b", *RUN[1:4], "model.hybrid_layer_pattern=--------",
        "--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "1",
        "--no-sequence-parallel", "model.layers.8.ffn_hidden_size=172032",
    )  # fmt: skip
    config = load_config(words, which=rules.NO_FILES, world_size=2)
    costs = predicted_costs(config, 2, GPUS["h100"])
    assert costs.of["-8"].total_ms > 6 * costs.of["-"].total_ms
    names = [sort.name for sort in sort_of_each(config.model)]
    assert Balancer(names, costs, 2, 1, 8).best().pattern == "-------|-"
    path = tmp_path / "costs.json"
    path.write_text(costs_json(costs))
    assert read_costs(path, names) == costs
    path.write_text(costs_json(Costs(MappingProxyType({"-": costs.of["-"]}))))
    with pytest.raises(UserError, match="'-8' is missing"):
        read_costs(path, names)
