"""Profiles of real steps: times that add up, belong to the right layers, and change nothing."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hybrid.testing import run_distributed
from tests.training.runs import losses, records, same_tensors, tensors_of_all, trainer, words

PROFILE = ["training.profile=true", "training.profile_step_start=1", "training.profile_step_end=3"]


def trained(lines: list[list[str]]) -> None:
    """On a rank: runs, one after the other."""
    for line in lines:
        with trainer(line) as run:
            run.run()


class Work(TorchDispatchMode):
    """A clock that goes by what is computed: a second is a million numbers that torch writes."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._seconds += sum(e.numel() for e in tree_leaves(made) if isinstance(e, Tensor)) / 1e6
        return made

    def __call__(self) -> float:
        return self._seconds


def trained_by_work(lines: list[list[str]]) -> None:
    """On a rank: `trained`, where whoever looks at the clock sees the work that is done."""
    with Work() as work, mock.patch("time.perf_counter", work):
        trained(lines)


def table(run_dir: Path, rank: int = 0) -> dict[str, Any]:
    path = run_dir / "profile" / f"steps_2_3_rank_{rank:05d}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def trace_names(run_dir: Path) -> Counter[str]:
    """How often each name stands in the trace of rank 0."""
    with gzip.open(run_dir / "profile" / "steps_2_3_rank_00000.trace.json.gz", "rt") as file:
        return Counter(event.get("name") for event in json.load(file)["traceEvents"])


def row(found: dict[str, Any], what: str) -> dict[str, Any]:
    [found_row] = [each for each in found["rows"] if each["what"] == what]
    return dict(found_row)


def test_files_and_times(tmp_path: Path) -> None:
    """A trace, a table and a picture; the rows are the whole of the steps, and every kind is there;
    the result is bit for bit that of a run without a profile.
    """
    with_it, without = tmp_path / "profiled", tmp_path / "plain"
    size = ["model.hybrid_layer_pattern=M*E-", "model.num_moe_experts=4", "model.hidden_size=64"]
    run_distributed(trained, 1, [words(with_it, *size, *PROFILE), words(without, *size)])
    assert losses(with_it) == losses(without)
    last = [run / "checkpoints" / "iter_0000004" for run in (with_it, without)]
    assert same_tensors(*run_distributed(tensors_of_all, 1, last)[0])
    assert not (without / "profile").exists()
    found = table(with_it)
    assert found["steps"] == 2
    for kind in ("Mamba", "attention", "MoE", "MLP", "embedding", "output and loss"):
        times = row(found, kind)
        assert times["forward_ms"] > 0
        assert times["backward_ms"] > 0
        assert times["recomputed_ms"] == 0
    for cause in ("data", "optimizer", "gradients between ranks", "other"):
        assert row(found, cause)["total_ms"] > 0
    assert found["step_ms"] == pytest.approx(sum(r["total_ms"] for r in found["rows"]))
    assert {"M forward 1", "* forward 2", "data", "optimizer"} <= trace_names(with_it).keys()
    assert (with_it / "profile" / "steps_2_3_rank_00000.png").read_bytes().startswith(b"\x89PNG")
    [event] = [r for r in records(with_it, "event") if r["name"] == "profile"]
    assert "Mamba" in event["message"]


def test_time_belongs_to_its_layers(tmp_path: Path) -> None:
    """By a clock that goes by the work done: three times the MLPs take three times as long,
    forward and backward, while the one attention layer takes what it took; layers that are computed
    again take the same once more; and the rows come to what the trainer takes a step for.
    """
    again = [
        "training.recompute_granularity=full", "training.recompute_method=uniform",
        "training.recompute_num_layers=1",
    ]  # fmt: skip
    variants = {
        "few": ["model.hybrid_layer_pattern=*--"],
        "many": ["model.hybrid_layer_pattern=*------"],
        "again": ["model.hybrid_layer_pattern=*------", *again],
    }
    lines = [words(tmp_path / name, *PROFILE, *more) for name, more in variants.items()]
    run_distributed(trained_by_work, 1, lines)
    few, many, repeated = (table(tmp_path / name) for name in variants)
    for phase in ("forward_ms", "backward_ms"):
        assert row(many, "MLP")[phase] == pytest.approx(3 * row(few, "MLP")[phase])
        assert row(many, "attention")[phase] == pytest.approx(row(few, "attention")[phase])
    for what in ("MLP", "attention"):
        assert row(repeated, what)["recomputed_ms"] == pytest.approx(row(many, what)["forward_ms"])
        assert row(many, what)["recomputed_ms"] == 0
    for name in variants:
        steps = [record["step_ms"] for record in records(tmp_path / name)[1:3]]
        assert table(tmp_path / name)["step_ms"] == pytest.approx(sum(steps) / 2)


def test_stages(tmp_path: Path) -> None:
    """PP2: each profiled rank has the layers of its stage, and waits for the other."""
    line = words(
        tmp_path, "model.hybrid_layer_pattern=M*|-M", *PROFILE, "training.profile_ranks=[0,1]",
        "parallel.pipeline_model_parallel_size=2",
    )  # fmt: skip
    run_distributed(trained, 2, [line])
    first, second = table(tmp_path, 0), table(tmp_path, 1)
    kinds = [{r["what"] for r in found["rows"]} for found in (first, second)]
    assert {"embedding", "Mamba", "attention", "pipeline transfers"} <= kinds[0]
    assert {"Mamba", "MLP", "output and loss", "pipeline transfers"} <= kinds[1]
    assert "MLP" not in kinds[0]
    assert not {"embedding", "attention"} & kinds[1]
    assert row(second, "output and loss")["backward_ms"] > 0


def test_evaluations_are_no_steps(tmp_path: Path) -> None:
    """An evaluation between two recorded steps is no layer's time."""
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    more = ["training.eval_interval=2", "training.eval_iters=20"]
    run_distributed(trained, 1, [words(plain, *PROFILE), words(evaluated, *PROFILE, *more)])
    assert [r["iteration"] for r in records(evaluated, "validation")] == [2, 4]
    passes, of_both = (
        {name: count for name, count in trace_names(run).items() if " forward" in name}
        for run in (plain, evaluated)
    )
    assert passes
    assert of_both == passes  # of forward passes there were eleven times as many


def test_a_run_that_ends_before(tmp_path: Path) -> None:
    """What was recorded until then is written."""
    run_distributed(trained, 1, [words(tmp_path, *PROFILE[:2], "training.profile_step_end=50")])
    assert (tmp_path / "profile" / "steps_2_4_rank_00000.json").exists()


def test_that_nothing_was_profiled_is_said(tmp_path: Path) -> None:
    """Steps that the run does not come to, or has behind it, or ranks that are none: one event at
    the end, with the fields; a profile that was written says nothing of the kind.
    """
    whole, late, none = tmp_path / "whole", tmp_path / "late", tmp_path / "none"
    lines = [
        words(whole, *PROFILE),
        words(whole, "training.profile=true", "training.profile_step_start=2",
              "training.train_iters=6"),
        words(late, "training.profile=true"),
        words(none, *PROFILE, "training.profile_ranks=[]"),
    ]  # fmt: skip
    run_distributed(trained, 1, lines)
    said = {
        run.name: [r["message"] for r in records(run, "event") if r["name"] == "profile"]
        for run in (whole, late, none)
    }
    assert said["whole"][0].splitlines()[-1].startswith("profile: ")
    begin = "no step was profiled: training.profile_step_start="
    assert said["whole"][1:] == [
        f"{begin}2 begins with step 3, training.profile_ranks are 0, and this start did steps 5 to "
        "6"
    ]
    assert said["late"] == [
        f"{begin}10 begins with step 11, training.profile_ranks are 0, and this start did steps 1 "
        "to 4"
    ]
    assert len(said["none"]) == 1 and "are no rank, and" in said["none"][0]
