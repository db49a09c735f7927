"""What was upcycled trains on: data, counters and schedule as the config says, in any layout."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config import load_config
from megatron_hybrid.data.saved_plan import read_saved_plan
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.start import open_run
from megatron_hybrid.upcycling.request import Request
from tests.training.phased import STEPS, corpora, phased_words
from tests.training.runs import losses, outcomes, records, tensors_of_all
from tests.upcycling.models import upcycle

STOP = 12  # in the middle of the second phase
DENSE = ["model.hybrid_layer_pattern=M-|*-", "model.ffn_hidden_size=64"]
TP2_PP2 = [
    "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
]  # fmt: skip
ONE_RANK = [
    "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
    "parallel.pipeline_model_parallel_size=1", "model.hybrid_layer_pattern=ME*E",
]  # fmt: skip
EP2 = [*ONE_RANK, "parallel.expert_model_parallel_size=2"]
TP2 = [*ONE_RANK, *TP2_PP2[:2]]
REQUEST = Request(experts=2, granularity=4, topk=2)


@dataclasses.dataclass(frozen=True)
class Upcycled:
    """A dense run, whole and cut, and the checkpoints made of the cut one."""

    dense: Path
    whole: Path
    restarted: Path
    kept: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Upcycled:
    """TP2xPP2 saves a dense run at step 12; one process upcycles it, in two ways."""
    folder = tmp_path_factory.mktemp("upcycled")
    sources = corpora(folder, "web", "code", "math")
    lines = [
        phased_words(folder / "whole", sources, *DENSE, *TP2_PP2),
        phased_words(folder / "dense", sources, *DENSE, *TP2_PP2, f"training.exit_interval={STOP}"),
    ]
    assert run_distributed(outcomes, 4, lines)[0] == ["finished", "exit_interval"]
    upcycle(folder / "dense", folder / "moe" / "checkpoints", REQUEST)
    upcycle(folder / "dense", folder / "kept", REQUEST, restart_schedule=False)
    return Upcycled(
        folder / "dense", folder / "whole", folder / "moe" / "checkpoints", folder / "kept"
    )


def goes_on(load: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line that trains on from a checkpoint."""
    return ["--load", str(load), f"run_dir={run_dir}", "training.exit_interval=null", *more]


def test_the_checkpoint_describes_itself(made: Upcycled) -> None:
    """Step, samples, plan and config are there; the optimizer's state is not."""
    config = load_config(["--load", str(made.restarted)], world_size=4, has_cuda=False)
    assert config.model.hybrid_layer_pattern == "ME|*E"
    assert (config.model.num_moe_experts, config.model.moe_ffn_hidden_size) == (8, 16)
    assert config.model.moe_aux_loss_coeff == 0.01
    assert config.run_dir == made.restarted.parent
    assert config.checkpoint.save == made.restarted
    folder = made.restarted / f"iter_{STOP:07d}"
    plans = [read_saved_plan(each) for each in (folder, made.dense / "checkpoints" / folder.name)]
    assert plans[0] == plans[1]
    (held,) = run_distributed(tensors_of_all, 1, [folder])[0]
    assert not any("optimizer" in name for name in held)


def test_trains_on_in_other_layouts(made: Upcycled, tmp_path: Path) -> None:
    """From the same checkpoint EP2, TP2xEP1 and one rank go on at the next sample and agree; the
    dense checkpoint upcycled by EP2's own ranks gives the very same losses.
    """
    lines = {"EP2": EP2, "TP2": TP2}
    for name, words in lines.items():
        line = goes_on(made.restarted, tmp_path / name, *words)
        assert run_distributed(outcomes, 2, [line])[0] == ["finished"]
    on_ranks = load_config(["--load", str(made.restarted)], world_size=4, has_cuda=False)
    config = tmp_path / "moe.yaml"
    config.write_text(on_ranks.to_yaml())
    line = [
        str(config), f"run_dir={tmp_path / 'on ranks'}", *EP2, "training.exit_interval=null",
        "checkpoint.save=null", "checkpoint.load=null", "optimizer.restart_schedule=true",
        f"upcycling.from={made.dense / 'checkpoints'}",
    ]  # fmt: skip
    assert run_distributed(outcomes, 2, [line])[0] == ["finished"]
    assert losses(tmp_path / "TP2") == pytest.approx(losses(tmp_path / "EP2"), rel=1e-5)
    assert losses(tmp_path / "on ranks") == losses(tmp_path / "EP2")
    steps, whole = records(tmp_path / "EP2"), records(made.whole)[STOP:]
    assert [step["iteration"] for step in steps] == list(range(STOP + 1, STEPS + 1))
    for name in ("consumed_samples", "phase", "source_tokens"):
        assert [step[name] for step in steps] == [step[name] for step in whole]


def test_schedule_starts_anew_or_goes_on(made: Upcycled, tmp_path: Path) -> None:
    """Restarted, the learning rate warms up once more and decays over what is left of the run;
    kept, it is that of the dense run; the same by `optimizer.restart_schedule` for dense weights.
    """
    lines = [
        goes_on(made.restarted, tmp_path / "restarted", *ONE_RANK),
        goes_on(made.kept, tmp_path / "kept", *ONE_RANK),
        goes_on(
            made.dense / "checkpoints", tmp_path / "dense", *ONE_RANK[:3],
            "model.hybrid_layer_pattern=M-*-", "optimizer.restart_schedule=true",
        ),
    ]  # fmt: skip
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 3
    rates = {
        name: [step["learning_rate"] for step in records(tmp_path / name)]
        for name in ("restarted", "kept", "dense")
    }
    whole = [step["learning_rate"] for step in records(made.whole)]
    assert rates["kept"] == whole[STOP:]
    assert rates["restarted"] == rates["dense"]
    assert rates["restarted"][0] == whole[0]
    peak = max(rates["restarted"])
    assert peak == pytest.approx(1e-3, rel=0.05)
    assert peak > 1.1 * max(whole[STOP:])
    assert rates["restarted"][-1] < 0.2 * peak


def test_resumes_as_if_never_stopped(made: Upcycled, tmp_path: Path) -> None:
    """A run that started by upcycling and was stopped goes on bit for bit, its schedule too."""
    config = load_config(["--load", str(made.restarted)], world_size=4, has_cuda=False)
    path = tmp_path / "moe.yaml"
    path.write_text(config.to_yaml())

    def line(name: str, *more: str) -> list[str]:
        return [
            str(path), f"run_dir={tmp_path / name}", *EP2, "checkpoint.save=null",
            "checkpoint.load=null",
            f"upcycling.from={made.dense / 'checkpoints'}", "optimizer.restart_schedule=true",
            "training.exit_interval=null", *more,
        ]  # fmt: skip

    stopped = f"training.exit_interval={STOP + 6}"
    for each in (line("one"), line("two", stopped), line("two")):
        assert run_distributed(outcomes, 2, [each])[0][0] in ("finished", "exit_interval")
    timing = {"tokens_per_s", "model_tflops_per_rank", "step_ms", "peak_memory_gib", "eta_s"}
    one, two = (
        [{k: v for k, v in step.items() if k not in timing} for step in records(tmp_path / name)]
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) == STEPS - STOP
    last = [tmp_path / name / "checkpoints" / f"iter_{STEPS:07d}" for name in ("one", "two")]
    states: list[dict[str, Any]] = run_distributed(tensors_of_all, 1, last)[0]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_restart_in_place_is_refused(made: Upcycled) -> None:
    """A run that restarted its schedule each time it is requeued would never get anywhere."""
    line = goes_on(made.restarted, made.restarted.parent, *EP2, "optimizer.restart_schedule=true")
    (found,) = run_distributed(outcomes, 2, [line])[0]
    assert "optimizer.restart_schedule=true cannot start from" in found


def test_a_schedule_without_room_is_refused(made: Upcycled, tmp_path: Path) -> None:
    """Known only when the checkpoint is: a warm-up longer than what is left of the run."""
    line = goes_on(
        made.restarted, tmp_path, *EP2, "optimizer.lr_warmup_fraction=null",
        "optimizer.lr_warmup_tokens=3500",
    )  # fmt: skip
    (found,) = run_distributed(outcomes, 2, [line])[0]
    assert "from token 1536 on" in found and "lr_warmup_tokens=3500" in found


def test_another_model_is_refused_before_any_rank_starts(made: Upcycled, tmp_path: Path) -> None:
    """The dense run's own config says what its checkpoint can become; every reason at once."""
    dense = made.dense / "checkpoints"
    words = [
        str(dense / f"iter_{STOP:07d}" / "run_config.yaml"), f"run_dir={tmp_path}", *EP2,
        f"upcycling.from={dense}", "model.num_moe_experts=6", "model.moe_ffn_hidden_size=24",
        "model.mamba_state_dim=16", "checkpoint.save=null",
    ]  # fmt: skip
    config = load_config(words, world_size=2, has_cuda=False)
    with pytest.raises(UserError) as caught:
        open_run(config, 2)
    for problem in (
        "model.mamba_state_dim=16, in the dense checkpoint 8",
        "model.moe_ffn_hidden_size=24 must divide the MLPs' model.ffn_hidden_size=64; "
        "allowed: 64, 32, 16, 8, 4, 2, 1",
    ):
        assert problem in str(caught.value)
