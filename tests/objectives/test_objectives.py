"""An objective of a user's own: one file, named in a config, trained, evaluated and resumed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_hybrid.config import load_config, rules
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.objectives import Losses
from megatron_hybrid.objectives.registry import build_objective, objective_problems
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.named import NAMED, check_named
from megatron_hybrid.training.step import Stepper
from tests.training.runs import GLOBAL_BATCH_SIZE, losses, outcomes, records, trainer, words

OWN = "tests.objectives.own"
WEIGHTED = [f"training.objective={OWN}:Weighted", "training.objective_options.small=0.01"]


def by_hand(line: list[str]) -> tuple[float, float]:
    """On a rank: what `Weighted` minimises and reports on the held-out samples, by hand."""
    from megatron_hybrid.data.datasets import open_windows

    with trainer(line) as run:
        run.run()
        _, valid = open_windows(run.config, run.tokenizer, run.data)
        assert valid is not None
        loss = small = 0.0
        for number in range(GLOBAL_BATCH_SIZE):
            window = torch.from_numpy(valid.__getitems__([number]))
            with torch.no_grad():
                places = torch.arange(window.shape[1] - 1)[None]
                logits = run.model[0](window[:, :-1], places, None)[0]
            square = logits.logsumexp(-1).square().mean()
            cross_entropy = F.cross_entropy(logits, window[0, 1:])
            loss += float(cross_entropy + 0.01 * square) * (1 + number % 3)
            small += float(square)
        return loss / GLOBAL_BATCH_SIZE, small / GLOBAL_BATCH_SIZE


def all_runs(lines: list[list[str]], evaluated: list[str]) -> tuple[list[str], Any]:
    """On a rank: how several runs end, and `by_hand` of one more."""
    return outcomes(lines), by_hand(evaluated)


def test_one_file_is_enough(tmp_path: Path) -> None:
    """From hidden states, pre-training's losses to the bit. By sequence from logits, with weights
    of the samples' own: what a plain loop says; the same in micro batches of any size, and to the
    bit after a resume."""
    names = ("plain", "hidden", "micro", "resumed")
    plain, hidden, micro, resumed = (tmp_path / name for name in names)
    evaluation = ["training.eval_interval=4", "training.eval_iters=1"]
    found, expected = run_distributed(
        all_runs,
        1,
        [
            words(plain),
            words(hidden, f"training.objective={OWN}:NextByHidden"),
            words(micro, *WEIGHTED, "training.micro_batch_size=1"),
            words(resumed, *WEIGHTED, "training.exit_interval=2"),
            words(resumed, *WEIGHTED),
            # Its losses are no spikes beside those of pre-training.
            words(
                tmp_path / "other",
                *WEIGHTED,
                f"checkpoint.load={plain}/checkpoints",
                "training.train_iters=5",
                "training.loss_spike_factor=1.01",
            ),
        ],
        words(tmp_path / "whole", *WEIGHTED, *evaluation),
    )[0]
    assert found == ["finished"] * 3 + ["exit_interval", "finished", "finished"]
    assert losses(hidden) == losses(plain)
    assert losses(tmp_path / "other")[0] > 1.5 * losses(plain)[-1]
    whole = losses(tmp_path / "whole")
    assert losses(micro) == pytest.approx(whole, rel=1e-6)
    assert losses(resumed) == whole
    assert whole[-1] < whole[0]
    [logged] = records(tmp_path / "whole", "validation")
    assert (logged["loss"], logged["extra"]["small"]) == pytest.approx(expected, rel=1e-6)
    assert logged["extra"]["samples"] == GLOBAL_BATCH_SIZE
    for record in records(resumed):  # of step i samples 4 (i - 1) to 4 i - 1
        first = 4 * (record["iteration"] - 1)
        mean = sum(1 + sample % 3 for sample in range(first, first + 4)) / 4
        assert record["extra"]["mean_factor"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["objective=pretrianing"], "training.objective=pretrianing is not an objective; "
         "did you mean pretraining? allowed: pretraining"),
        ([f"objective={OWN}:NoObjective"], "is not a subclass of megatron_hybrid.objectives."
         "Objective"),
        (["objective_options={small: 1}"], "training.objective=pretraining has no options"),
        ([f"objective={OWN}:Weighted"], "training.objective_options.small is not set; it must be a "
         "number above 0"),
        ([f"objective={OWN}:Weighted", "objective_options={smal: 1.0, small: -1}"],
         f"objective_options.smal is not an option of {OWN}:Weighted; did you mean small?"),
        ([f"objective={OWN}:Weighted", "objective_options.small=-1"],
         "training.objective_options.small=-1 must be a number above 0"),
    ],
)  # fmt: skip
def test_what_is_refused(options: list[str], problem: str, tmp_path: Path) -> None:
    """Names, options and layouts that it cannot have, in one message, before any rank starts."""
    config = load_config(words(tmp_path, *(f"training.{option}" for option in options)))
    assert problem in "\n".join(objective_problems(config))


def test_all_at_once(tmp_path: Path) -> None:
    """An objective says what of a config it cannot do, beside what else is wrong with names."""
    line = words(tmp_path, *WEIGHTED, "training.callbacks=[no:One]")
    config = load_config([*line, "parallel.tensor_model_parallel_size=2"])
    with pytest.raises(ConfigError) as caught:
        check_named(config)
    assert len(caught.value.problems) == 2
    # Of the config's own rules, a field that is wrong hides none of the others.
    wrong = ["training.objective=masked_diffusion", "data.seq_length=0", "optimizer.lr=-1",
             "training.objective_options.mask_token_id=64"]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        load_config([*words(tmp_path), *wrong], which=(*rules.ALL, *NAMED))
    found = "\n".join(caught.value.problems)
    assert all(
        each in found for each in ("data.seq_length=0", "optimizer.lr=-1", "mask_token_id=64")
    )
    assert "needs a pattern without 'M' layers" in found


@pytest.mark.parametrize(
    ("values", "weights", "count", "problem"),
    [
        ((2, 3), (3, 2), None, r"values of shape \[2, 3\] with weights of \[3, 2\]"),
        ((6,), (1,), None, r"values of shape \[6\] with weights of \[1\]"),
        ((2, 3), (2, 3), None, "divides by 1.5, the sum of its counts or weights"),
        ((2, 3), (2, 3), 2.5, "divides by 2.5"),
        ((2, 3), (2, 3), 2.0, None),
    ],
)
def test_losses_that_would_be_something_else(
    values: tuple[int, ...], weights: tuple[int, ...], count: float | None, problem: str | None
) -> None:
    """Shapes that broadcast, or have as many elements, and counts of which the engine takes the
    floor; through weights that are computed no gradient goes."""
    learnt = torch.full(weights, 0.25, requires_grad=True)
    found = Losses(
        torch.ones(values, requires_grad=True), learnt,
        count=None if count is None else torch.tensor(count),
    )  # fmt: skip
    run: Any = object.__new__(Stepper)
    run.watch, run.config = None, load_config(words(Path("nowhere")))
    run.objective = SimpleNamespace(losses=lambda *_: found, reports=(), report=lambda *_: {})

    def step() -> None:
        loss, _, sums = run._add_up(None, torch.nn.Identity(), torch.ones(1))
        loss.backward()
        with (
            patch("torch.distributed.all_reduce"),
            patch.object(parallel_state, "get_tensor_model_parallel_rank", return_value=0),
        ):
            run._reduce(sums, [])

    if problem is None:
        step()
        assert learnt.grad is None
        return
    with pytest.raises(UserError, match=problem):
        step()


def test_more_tokens_are_predicted_beside_next_ones() -> None:
    """An objective of other tokens is refused with the modules; that of next tokens is not."""
    ahead = ["tiny", "model.mtp_num_layers=1", "model.mtp_hybrid_override_pattern=*"]
    config = load_config(ahead, which=())
    assert objective_problems(config) == []
    own = load_config([*ahead, *WEIGHTED], which=())
    assert objective_problems(own) == [
        f"model.mtp_num_layers=1 with training.objective={OWN}:Weighted is not supported: it is "
        "not of next tokens; allowed: null"
    ]


def test_an_objective_with_modules_keeps_its_state(tmp_path: Path) -> None:
    """What a checkpoint held is the objective's own before the first step of a resumed run, and
    what it changes is what the next checkpoint holds."""
    ahead = ["model.mtp_num_layers=1", "model.mtp_hybrid_override_pattern=*"]
    own = f"training.objective={OWN}:Counted"
    objective: Any = build_objective(load_config(words(tmp_path, *ahead, own), which=()))
    objective.state = {"steps": 2.0}
    assert objective.inner.state == {"steps": 2.0}
    objective.after_step({})
    assert objective.state == {"steps": 3.0}
