"""What a run leaves of its experts' load, and the words for it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.expert_load import ExpertLoad
from megatron_hybrid.training.metrics import scalars
from tests.training.runs import MOE, outcomes, records, words

LOAD = ExpertLoad(
    layers=(2, 5), tokens=np.array([[4, 4, 4, 4], [12, 4, 0, 0]]), asked=np.array([16, 20])
)


def test_numbers_of_a_load() -> None:
    """Shares, the busiest over the mean, dropped and dead, by layer."""
    assert LOAD.shares.tolist() == [[0.25] * 4, [0.75, 0.25, 0.0, 0.0]]
    assert LOAD.max_over_mean.tolist() == [1.0, 3.0]
    assert LOAD.dropped.tolist() == pytest.approx([0.0, 0.2])
    assert LOAD.dead.tolist() == [0, 2]
    assert LOAD.line() == "expert load 3.00 x mean in layer 5, 2 dead, 20.0% dropped"
    tags = scalars({"kind": "train", "expert_load": LOAD.summary()})
    assert tags["expert_load/max_over_mean/layer_5"] == 3.0


def test_layers_of_fewer_experts() -> None:
    """What a layer has not is neither dead nor in its mean, nor in what is recorded."""
    load = ExpertLoad((2, 5), np.array([[4, 4, 4, 4], [12, 0, 0, 0]]), np.array([16, 12]), (4, 2))
    assert load.rows == [[0.25] * 4, [1.0, 0.0]]
    assert load.max_over_mean.tolist() == [1.0, 2.0]
    assert load.dead.tolist() == [0, 1]


def test_a_layer_that_took_nothing() -> None:
    """No division by zero where a step was all dropped or padding."""
    empty = ExpertLoad((1,), np.zeros((1, 4), dtype=np.int64), np.zeros(1, dtype=np.int64))
    assert empty.shares.tolist() == [[0.0] * 4]
    assert empty.max_over_mean.tolist() == [0.0]


def test_a_run_records_its_experts_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each step has a number a layer, every second the shares; the console the worst layer."""
    line = words(tmp_path, *MOE, "logging.expert_load_interval=2", "logging.tensorboard=true")
    assert run_distributed(outcomes, 1, [line]) == [["finished"]]
    loads = [record["expert_load"] for record in records(tmp_path)]
    assert [load["layers"] for load in loads] == [[3]] * 4
    assert all(load["max_over_mean"][0] >= 1 for load in loads)
    shares = records(tmp_path, "expert_load")
    assert [record["iteration"] for record in shares] == [2, 4]
    for record in shares:
        (row,) = record["shares"]
        assert len(row) == 4
        assert sum(row) == pytest.approx(1, abs=1e-5)
        assert max(row) * 4 == pytest.approx(
            loads[record["iteration"] - 1]["max_over_mean"][0], abs=1e-5
        )
    assert "expert load" in capfd.readouterr().out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("expert_load/max_over_mean/layer_3")]
    assert found == pytest.approx([load["max_over_mean"][0] for load in loads])


def test_a_dense_run_records_none(tmp_path: Path) -> None:
    """Without experts there is nothing of them in the metrics."""
    run_distributed(outcomes, 1, [words(tmp_path)])
    assert [record["expert_load"] for record in records(tmp_path)] == [None] * 4
    assert records(tmp_path, "expert_load") == []
