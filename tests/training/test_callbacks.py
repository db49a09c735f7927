"""A user's own callbacks: when they are called, that they change nothing, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.config import load_config
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.extensions import load_class
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.callbacks import Callback
from megatron_hybrid.training.callbacks.ordered import Callbacks
from megatron_hybrid.training.start import open_run
from tests.training.own_callbacks import SEEN
from tests.training.runs import losses, records, trainer, words

OWN = "tests.training.own_callbacks"


def ends(lines: list[list[str]]) -> list[str]:
    """On a rank: how each run ends: its reason, or its error."""
    found = []
    for line in lines:
        try:
            with trainer(line) as run:
                found.append(run.run())
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_hooks(tmp_path: Path) -> None:
    """Each hook at its moment, over two starts; the losses are those of a run without callbacks,
    though they draw random numbers, as dropout does; one that raises names itself, and the others
    learn that the run is over."""
    common = [
        "model.hidden_dropout=0.1", "training.eval_interval=2", "training.eval_iters=1",
        "checkpoint.save_interval=2",
    ]  # fmt: skip
    seen = f"training.callbacks=[{OWN}:Seen]"
    plain, own, fails, bad = (tmp_path / name for name in ("plain", "own", "fails", "bad"))
    found = run_distributed(
        ends,
        1,
        [
            words(plain, *common),
            words(own, *common, seen, "training.exit_interval=2"),
            words(own, *common, seen),
            words(fails, *common, f"training.callbacks=[{OWN}:Seen, {OWN}:Fails]"),
            words(bad, seen, "optimizer.lr=1e30", "optimizer.weight_decay=0"),
        ],
    )[0]
    assert found[:3] == ["finished", "exit_interval", "finished"]
    assert found[3] == (
        f"CallbackError: training.callbacks: {OWN}:Fails failed in after_step after step 2: "
        "KeyError: 'wandb'"
    )
    assert found[4].startswith("TrainingStoppedError: step 2: the loss or the gradient is not")
    assert losses(own) == losses(plain)
    assert [r["extra"]["twice_the_loss"] for r in records(own)] == [2 * x for x in losses(own)]
    first = ["start 0", "before 1", "after 1", "before 2", "after 2", "evaluated 2", "saved 2"]
    second = ["start 2", "before 3", "after 3", "before 4", "after 4", "evaluated 4", "saved 4"]
    assert (own / SEEN).read_text().splitlines() == [
        *first, "end exit_interval", *second, "end finished"
    ]  # fmt: skip
    assert (fails / SEEN).read_text().splitlines() == [*first[:5], "end None"]
    assert (bad / SEEN).read_text().splitlines() == [*first[:5], "bad 2 nonfinite", "end None"]


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("no.such.module:It", "cannot be imported: No module named 'no'"),
        (f"{OWN}:Nobody", "has no Nobody"),
        (f"{OWN}:NoCallback", "is not a subclass of megatron_hybrid.training.callbacks.Callback"),
        (f"{OWN}:SEEN", "is not a subclass of megatron_hybrid.training.callbacks.Callback"),
        (OWN, "must be package.module:Class"),
        ("a b:C", "must be package.module:Class"),
    ],
)
def test_what_cannot_be_loaded(word: str, problem: str) -> None:
    """One message with the field, its value and what is wrong with it."""
    with pytest.raises(UserError) as caught:
        load_class("training.callbacks", word, Callback)
    text = str(caught.value)
    assert text.startswith(f"training.callbacks={word}")
    assert problem in text


def test_refused_before_a_rank_starts(tmp_path: Path) -> None:
    """Whoever starts ranks opens the run first: all that cannot be had is said at once."""
    line = words(tmp_path, f"training.callbacks=[no.module:It, {OWN}:Seen, {OWN}:Nobody]")
    with pytest.raises(ConfigError) as caught:
        open_run(load_config(line), 1)
    assert len(caught.value.problems) == 2


class Figure(Callback):
    def __init__(self, figures: Any) -> None:
        self.figures = figures

    def metrics(self, run: Any, step: Any) -> Any:
        return self.figures


@pytest.mark.parametrize(
    ("figures", "found"),
    [({"x": 1}, {"x": 1.0}), ({"x": torch.tensor(2.0)}, {"x": 2.0}), ({"x": "one"}, None),
     ({"x": torch.ones(2)}, None), ({"x": None}, None), (None, None), ([1.0], None)],
)  # fmt: skip
def test_figures_are_numbers(figures: Any, found: dict[str, float] | None) -> None:
    """What could not be written down is the callback's, and named so, not metrics.jsonl's."""
    callbacks = Callbacks([], [("my.module:Figure", Figure(figures))])
    run: Any = SimpleNamespace(progress=SimpleNamespace(iteration=3))
    if found is not None:
        assert callbacks.metrics(run, None, {}) == found  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match=r"metrics of my\.module:Figure must be numbers by name"):
        callbacks.metrics(run, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("taken", ["loss", "params_norm", "z_loss", "masked_loss", "x", None])
def test_no_figure_takes_the_place_of_another(taken: str | None) -> None:
    """Ours, the objective's and those of other callbacks have their names."""
    named = [("a:X", Figure({"x": 1})), ("b:Y", Figure({taken or "y": 2}))]
    callbacks = Callbacks([Figure({"params_norm": 3})], named)
    known = {"the router": {"z_loss": 4.0}, "training.objective": {"masked_loss": 5.0}}
    run: Any = SimpleNamespace(progress=SimpleNamespace(iteration=3))
    if taken is None:
        found = callbacks.metrics(run, None, known)  # type: ignore[arg-type]
        assert found == {"z_loss": 4, "masked_loss": 5, "params_norm": 3, "x": 1, "y": 2}
        return
    with pytest.raises(UserError, match=rf"training\.callbacks: b:Y has a figure '{taken}'"):
        callbacks.metrics(run, None, known)  # type: ignore[arg-type]
