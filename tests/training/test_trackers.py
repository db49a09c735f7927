"""W&B without a network, and MLflow in a folder: the real ones, held against metrics.jsonl."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.commands.track import track
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.testing import RankError, run_distributed
from megatron_hybrid.training.metrics import read_records, scalars
from megatron_hybrid.training.trackers import follow
from megatron_hybrid.training.trackers.base import Target
from megatron_hybrid.training.trackers.rows import Row, Rows
from megatron_hybrid.training.trackers.targets import targets
from megatron_hybrid.training.trackers.wandb import _log_records
from tests.training.runs import outcomes, words
from tests.warm import python

TRACKERS = [
    "logging.wandb_project=hybrids", "logging.mlflow_experiment=hybrids",
    "logging.mlflow_run_name=a [name]",
]  # fmt: skip
EVALUATED = ["training.eval_interval=2", "training.eval_iters=1"]


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def expected(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        for tag, value in scalars(record).items():
            found.setdefault(tag, []).append((record["iteration"], value))
    return found


def in_mlflow(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], Any]:
    """What MLflow's folder has of the only run there, and the run."""
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((run_dir / "mlruns").absolute().as_uri())
    experiment = client.get_experiment_by_name("hybrids")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    found = {
        key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    return {key: sorted(values) for key, values in found.items()}, run


def in_wandb(run_dir: Path) -> tuple[dict[str, list[tuple[int, float]]], set[str]]:
    """What the files of all starts have, in their order, and the runs' ids."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    found: dict[str, list[tuple[int, float]]] = {}
    ids = set()
    for file in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        ids.add(file.stem)
        for data in _log_records(file.read_bytes()):
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in messages.Record.FromString(data).history.item
            }
            for tag in values.keys() - {"_step", "_timestamp", "_runtime"}:
                found.setdefault(tag, []).append((values["_step"], values[tag]))
    return found, ids


def tracked(lines: list[list[str]], executable: str) -> list[str]:
    """On a rank: `outcomes`, with trackers' processes that have imported what they need."""
    sys.executable = executable
    return outcomes(lines)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 after step 5, on from the checkpoint of step 4: both trackers have one run with every
    number of metrics.jsonl, and no step twice; a start without anything to do adds nothing.
    """
    line = words(
        tmp_path / "run", *TRACKERS, *EVALUATED, "training.train_iters=6",
        "checkpoint.save_interval=2",
    )  # fmt: skip
    with pytest.raises(RankError, match="SIGKILL"):
        killed = [*line, "training.callbacks=[tests.training.own_callbacks:Killed]"]
        run_distributed(tracked, 1, [killed], python())
    assert run_distributed(tracked, 1, [line, line], python())[0] == ["finished", "finished"]
    metrics = expected(tmp_path / "run")
    assert [step for step, _ in metrics["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in metrics["validation/loss"]] == [2, 4, 6]
    found, run = in_mlflow(tmp_path / "run")
    steady = [tag for tag in metrics if not tag.startswith(("throughput", "memory"))]
    assert found.keys() == metrics.keys()
    assert {tag: found[tag] for tag in steady} == {tag: metrics[tag] for tag in steady}
    assert [len(found[tag]) for tag in metrics] == [len(metrics[tag]) for tag in metrics]
    assert (run.info.run_name, run.info.status) == ("a [name]", "FINISHED")
    assert run.data.params["model.hidden_size"] == "32"
    copies, ids = in_wandb(tmp_path / "run")
    assert len(ids) == 1
    assert {tag: copies[tag] for tag in steady} == {tag: metrics[tag] for tag in steady}


def mlflow_target(folder: Path, **options: Any) -> Target:
    """The target of a run whose metrics are written by hand."""
    line = words(folder, "logging.mlflow_experiment=hybrids")
    line += [f"logging.mlflow_{name}={value}" for name, value in options.items()]
    (target,) = targets(load_config(line))
    return target


def write(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(
                json.dumps({"kind": "validation", "iteration": step, "loss": step / 2}) + "\n"
            )


def ends(*answers: tuple[bool, str | None]) -> Callable[[float], tuple[bool, str | None]]:
    left = iter(answers)
    return lambda _: next(left)


def test_a_service_that_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a warning, once; when it is back it gets everything; `track` sends the rest."""
    monkeypatch.setattr(follow, "_FIRST_RETRY_S", 0.0)
    away = mlflow_target(tmp_path, tracking_uri="http://127.0.0.1:9")
    write(tmp_path, 1, 2)
    follow.follow(follow.Copy(away), ends((True, None)))
    assert "warning: mlflow cannot be reached: " in caplog.text
    caplog.set_level("INFO", "megatron_hybrid")
    with pytest.raises(UserError, match="mlflow cannot be reached"):
        track(tmp_path)  # which knows it, though nothing has reached it
    target = mlflow_target(tmp_path)
    answers = [ConnectionError("no route"), ConnectionError("no route"), None]

    def make(target: Target) -> Any:
        if (error := answers.pop(0)) is not None:
            raise error
        return follow.make_tracker(target)

    follow.follow(follow.Copy(target, make), ends((False, None), (False, None), (True, "SIGTERM")))
    error = caplog.text
    assert error.count("warning: mlflow cannot be reached: no route") == 1
    assert "mlflow: has everything again" in error
    found, run = in_mlflow(tmp_path)
    assert (found, run.info.status) == ({"validation/loss": [(1, 0.5), (2, 1.0)]}, "KILLED")
    write(tmp_path, 3)
    task = {"qa": {"metrics": {"exact_match,strict-match": 0.25, "chrf++": 4.0}}}
    for more in ({}, {"checkpoint": "iter_0000002"}):  # of the run, and of `evaluate`
        line = {"kind": "tasks", "iteration": 3 - len(more), "tasks": task, "groups": {}} | more
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    (tmp_path / "attempts.jsonl").write_text('{"event": "end", "reason": "finished"}\n')
    track(tmp_path)
    found, run = in_mlflow(tmp_path)
    assert found["validation/loss"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert found["tasks/qa/exact_match_strict-match"] == [(3, 0.25)]
    assert found["tasks/qa/chrf__"] == [(3, 4.0)]
    assert run.info.status == "FINISHED"
    with follow.alone(target, wait=False), pytest.raises(UserError, match="by its run"):
        track(tmp_path)
    with pytest.raises(UserError, match="has no trackers"):
        track(tmp_path / "other")
    (tmp_path / "trackers" / "mlflow.json").write_text('{"run": "4", "opt')
    with pytest.raises(UserError, match=r"trackers/mlflow.json is damaged: not JSON"):
        track(tmp_path)


def test_settings_of_a_later_start_in_mlflow(tmp_path: Path) -> None:
    """Where parameters cannot be changed, tags tell what is otherwise now; the name is the last."""
    first = mlflow_target(tmp_path, run_name="first")
    write(tmp_path, 1)
    follow.Copy(first).advance(last=True)
    optimizer = first.config["optimizer"]
    for rate, name, tags in (
        (0.5, "second", {"now.optimizer.lr": "0.5"}),
        (optimizer["lr"], "third", {"now.optimizer.lr": "0.001"}),
    ):
        config = {**first.config, "optimizer": {**optimizer, "lr": rate}}
        follow.Copy(replace(first, name=name, config=config)).advance(last=True)
        _, run = in_mlflow(tmp_path)
        assert {k: v for k, v in run.data.tags.items() if k.startswith("now.")} == tags
        assert (run.info.run_name, run.data.params["optimizer.lr"]) == (name, "0.001")


def test_names_that_mlflow_has_not(tmp_path: Path) -> None:
    """Layers of a kind and sources may have any; of what is gone later, a tag says so."""
    first = mlflow_target(tmp_path)
    model = {"layers": {"*": {"window_size": [8, 0]}, "-": {"activation": "gelu"}}}
    data = {"sources": {"c++": {"path": "a"}, "c__": {"path": "b"}}}
    follow.Copy(replace(first, config={"model": model, "data": data})).advance(last=True)
    _, run = in_mlflow(tmp_path)
    assert run.data.params == {
        "model.layers._.window_size": "[8, 0]", "model.layers.-.activation": "gelu",
        "data.sources.c__.path": "a", "data.sources.c__.path_": "b",
    }  # fmt: skip
    follow.Copy(replace(first, config={"model": {"layers": {}}, "data": data})).advance(last=True)
    _, run = in_mlflow(tmp_path)
    assert {name: text for name, text in run.data.tags.items() if name.startswith("now.")} == {
        "now.model.layers._.window_size": "null", "now.model.layers.-.activation": "null",
    }  # fmt: skip


class Service:
    """A tracker's runs, by id, as (step, values)."""

    def __init__(self) -> None:
        self.runs: dict[str, list[Row]] = {}
        self.last_step = -1

    def make(self, target: Target) -> Any:
        return self

    def open(self, known: str | None, remember: Callable[[str], None]) -> None:
        self.run = known or f"id{len(self.runs)}"
        if known is None:
            remember(self.run)
        self.last_step = max((row.step for row in self.runs.setdefault(self.run, [])), default=-1)

    def send(self, row: Row) -> None:
        if row.step > self.last_step:
            self.runs[self.run].append(row)

    def start(self, folder: Path, begins_after: int | None) -> None:
        """What a start of the run in a folder sends."""
        target = replace(mlflow_target(folder), begins_after=begins_after)
        follow.Copy(target, self.make).advance(last=True)


def test_a_run_whose_folder_was_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Goes on as a run of its own, with what was before; moved, it goes on in its own, and a copy
    that is only sent from, as from another machine, in that of its run."""
    service = Service()
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", 1, 2)
    service.start(tmp_path / "a", 0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "b", 3)
    service.start(tmp_path / "b", None)
    assert {run: len(rows) for run, rows in service.runs.items()} == {"id0": 3}
    service.start(tmp_path / "b", 3)
    assert {run: len(rows) for run, rows in service.runs.items()} == {"id0": 3, "id1": 3}
    assert caplog.messages == [
        f"note: {tmp_path}/b is a copy of {tmp_path}/a, which goes on in mlflow as it did: this "
        "one is a run of its own there"
    ]
    (tmp_path / "b").rename(tmp_path / "c")
    write(tmp_path / "c", 4)
    service.start(tmp_path / "c", 3)
    service.start(tmp_path / "a", 3)
    assert {run: len(rows) for run, rows in service.runs.items()} == {"id0": 3, "id1": 4}
    assert len(caplog.messages) == 1


def test_steps_that_a_service_keeps_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that does steps again, as at a lower rate, says that they are not sent again."""
    service = Service()
    write(tmp_path, 1, 2, 3)
    service.start(tmp_path, 0)
    service.start(tmp_path, 3)
    assert not caplog.messages
    service.start(tmp_path, 1)
    (said,) = caplog.messages
    assert said.startswith("note: mlflow has steps to 3 of an earlier start: those from 2 on are ")


def test_rows_of_a_growing_file(tmp_path: Path) -> None:
    """A row is given out once it is whole, half a line waits, what is not a number is left out."""
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    assert list(rows.read(last=False)) == []
    train = {"kind": "train", "loss": 2.0, "grad_norm": None, "extra": {"z": 1}, "iteration": 1}
    text = json.dumps(train) + "\n"
    path.write_text(text + '{"kind": "validat')
    assert list(rows.read(last=False)) == []
    path.write_text(
        text + json.dumps({"kind": "validation", "iteration": 1, "loss": 3.0}) + "\n"
        + json.dumps(train | {"iteration": 2}) + "\n"
    )  # fmt: skip
    one = {"train/loss": 2.0, "train/z": 1.0}
    assert list(rows.read(last=False)) == [Row(1, {**one, "validation/loss": 3.0})]
    assert list(rows.read(last=True)) == [Row(2, one)]
    assert list(rows.read(last=True)) == []
    path.rename(tmp_path / "before")
    path.write_text(text * 9)  # a later start's, with what is beyond the checkpoint gone
    assert list(rows.read(last=True)) == []
    assert all(math.isfinite(value) for value in one.values())


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, with what to install; a config may be looked at without it."""
    monkeypatch.setattr("megatron_hybrid.config.rules.files.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        load_config(words(tmp_path, *TRACKERS, "training.eval_tasks=[a, b]"))
    assert "training.eval_tasks=[a, b] needs the package lm_eval; allowed: [], or" in str(
        error.value
    )
    assert "logging.wandb_project=hybrids needs the package wandb; allowed: null, or" in str(
        error.value
    )
    assert "megatron-hybrid[mlflow]" in str(error.value)
    load_config(words(tmp_path, *TRACKERS), which=rules.NO_FILES)
