"""Terms of hidden states: against their formula in float64; in whole runs, whose projections are
trained, saved and resumed with the model, in another layout too, and left out of all else."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.cli import app
from megatron_hybrid.config import load_config
from megatron_hybrid.objectives.registry import objective_problems
from megatron_hybrid.testing import run_distributed
from tests.training.runs import (
    losses,
    outcomes,
    records,
    same_tensors,
    tensors_of_all,
    trainer,
    words,
)

NARROW = ["model.hidden_size=16", "model.mamba_head_dim=8"]
PAIRS = "[{student: 1, teacher: 2}, {student: 3, teacher: 4, weight: 0.5}]"
OPTIONS = "training.objective_options"
KEY = "objective.hidden_1.weight"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    line = words(
        folder, "model.hybrid_layer_pattern=M*M-", "training.seed=7", "training.train_iters=1"
    )
    assert run_distributed(outcomes, 1, [line])[0] == ["finished"]
    return folder


def student(run_dir: Path, teacher: Path, *more: str) -> list[str]:
    return words(
        run_dir, *NARROW, "training.objective=distillation", f"{OPTIONS}.teacher={teacher}",
        f"{OPTIONS}.hidden_states={PAIRS}", *more,
    )  # fmt: skip


def test_formula() -> None:
    """Value and gradient of a token, to 1e-6 of float64."""
    run_distributed(formulas, 1)


def formulas() -> None:
    for kind in ("cosine", "mse"):
        formula(kind)


def formula(kind: str) -> None:
    """On a rank: of one kind."""
    from megatron_hybrid.objectives.hidden_states import AddedLoss, token_losses

    draws = torch.Generator().manual_seed(1)
    student, other = (torch.randn(7, 3, 24, generator=draws) for _ in range(2))
    teacher = 3.0 * student + 0.5 * other
    mask = (torch.rand(7, 3, generator=draws) < 0.7).float()
    mine = student.clone().requires_grad_()
    values = token_losses(mine, teacher, kind)  # type: ignore[arg-type]
    # Its gradient comes beside the tensor's own, whatever that is.
    (2.0 * AddedLoss.apply(mine, (values * mask).sum())).sum().backward()

    exact, fixed = student.double().requires_grad_(), teacher.double()
    if kind == "mse":
        expected = (exact - fixed).pow(2).sum(-1) / 24
    else:
        expected = 1.0 - (exact * fixed).sum(-1) / (exact.norm(dim=-1) * fixed.norm(dim=-1))
    ((expected * mask.double()).sum() + 2.0 * exact.sum()).backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)
    assert mine.grad is not None and exact.grad is not None
    torch.testing.assert_close(mine.grad.double() - 2.0, exact.grad - 2.0, rtol=1e-6, atol=1e-6)


def projections(line: list[str]) -> list[torch.Tensor]:
    """On a rank: those that it starts with."""
    with trainer(line) as run:
        return [p.detach().clone() for n, p in run.model[0].named_parameters() if "objective." in n]


def test_a_run(teacher: Path, tmp_path: Path) -> None:
    """Terms come down, with balance and without; a run is resumed to the bit, in another layout
    from the very projections; evaluation, generation and a run without teacher do without."""
    whole, resumed, split, balanced, after, first, late = (tmp_path / name for name in "abcdefg")
    balance = [f"{OPTIONS}.balance_terms=true", f"{OPTIONS}.lm_loss_weight=0.1"]
    faster = ["optimizer.lr=1e-2", "training.train_iters=6"]
    stops = "training.exit_interval=3"
    plain = f"checkpoint.load={first}/checkpoints"
    lines = [
        student(whole, teacher, *faster, *balance, "training.eval_interval=6",
                "training.eval_iters=1"),
        *(student(to, teacher, *faster, *balance, stops) for to in (resumed, split)),
        student(resumed, teacher, *faster, *balance),
        student(balanced, teacher, *faster, f"{OPTIONS}.hidden_states_loss=mse"),
        words(after, *NARROW, f"checkpoint.load={whole}/checkpoints", "checkpoint.finetune=true"),
        words(first, *NARROW, "training.train_iters=2"),
        student(late, teacher, plain),
        student(late, teacher, plain, "checkpoint.load_optim=false"),
    ]  # fmt: skip
    *ends, refused, last = run_distributed(outcomes, 1, lines)[0]
    assert ends == ["finished", *["exit_interval"] * 2, *["finished"] * 4] and last == "finished"
    assert f"it holds no {KEY}, objective.hidden_3.weight" in refused
    assert "checkpoint.load_optim=false" in refused

    steps = records(whole)
    for step in steps:
        assert {"hidden_1", "hidden_3"} <= step["extra"].keys()
    assert steps[-1]["extra"]["hidden_1"] < 0.95 * steps[0]["extra"]["hidden_1"]
    # The first step knows no means; the second knows the first one's.
    a, b = (step["extra"] for step in steps[:2])
    total = a["kl"] + 0.1 * a["lm_loss"] + a["hidden_1"] + 0.5 * a["hidden_3"]
    assert steps[0]["loss"] == pytest.approx(total, rel=1e-6)
    parts = {"lm_loss": 0.1, "hidden_1": 1.0, "hidden_3": 0.5}
    second = b["kl"] + sum(w * a["kl"] / a[name] * b[name] for name, w in parts.items())
    assert steps[1]["loss"] == pytest.approx(second, rel=1e-6)
    raw = records(balanced)[-1]
    assert raw["loss"] == pytest.approx(
        raw["extra"]["kl"] + raw["extra"]["hidden_1"] + 0.5 * raw["extra"]["hidden_3"], rel=1e-6
    )
    assert losses(resumed) == losses(whole)
    folders = [find_checkpoint(each) for each in (resumed, whole, split)]
    ours, theirs, saved = run_distributed(tensors_of_all, 1, folders)[0]
    assert KEY in ours and f"optimizer.state.exp_avg.{KEY}" in ours
    assert same_tensors(ours, theirs)

    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
    again = student(split, teacher, *faster, *balance, *layout)
    for of_rank in run_distributed(projections, 2, again):
        assert torch.equal(of_rank[0], saved[KEY]) and len(of_rank) == 2
    assert run_distributed(outcomes, 2, [again])[0] == ["finished"]
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)

    for command in (["evaluate", str(whole)], ["generate", str(whole), "--prompt", "1 2 3"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ([f"{OPTIONS}.hidden_states=[{{student: 4, teacher: 1}}]"],
         "hidden_states: layer 4 of the student is not there; allowed: 1 to 3"),
        ([f"{OPTIONS}.hidden_states=[{{student: 1, teacher: 5}}]"],
         "hidden_states: layer 5 of the teacher is not there; allowed: 1 to 4"),
        ([f"{OPTIONS}.hidden_states=[{{student: 1, teacher: 1}}, {{student: 1, teacher: 2}}]"],
         "layer 1 of the student is in 2 pairs; allowed: each layer in one"),
        ([f"{OPTIONS}.hidden_states=[1]"], "must be a list of pairs of layers"),
        (["model.hybrid_layer_pattern=M*|-", "parallel.pipeline_model_parallel_size=2",
          f"{OPTIONS}.hidden_states=[{{student: 1, teacher: 4}}]"],
         "layer 1 of the student is on pipeline stage 0, layer 4 of the teacher on stage 1; "
         "allowed: the teacher's 1 to 2"),
        ([f"{OPTIONS}.teacher_parallel.tensor_model_parallel_size=2"],
         "with a layout of the teacher's own"),
        (["training.recompute_granularity=full"], "training.recompute_granularity=full is not"),
        ([f"{OPTIONS}.teacher=null", f"{OPTIONS}.teachers={{a: {{checkpoint: /nowhere}}}}"],
         "is of one teacher"),
        ([f"{OPTIONS}.cache=answers"], "of a cache (answers) no layers are kept"),
    ],
)  # fmt: skip
def test_what_is_refused(more: list[str], problem: str, teacher: Path, tmp_path: Path) -> None:
    line = student(tmp_path, teacher, *more)
    assert problem in "\n".join(objective_problems(load_config(line, which=())))
