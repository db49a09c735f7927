"""megatron-core itself on the CPU: each way to spread a run gives the same training as one rank."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from tests.platform import engine
from tests.platform.engine import Layout

DENSE, MOE = "*-*-", "*-*E"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS = {
    "TP2 with sequence parallelism": Layout(2, TP2, MOE, config={"sequence_parallel": True}),
    "PP2": Layout(2, PP2, "*-|*E"),
    "PP2xVPP2": Layout(2, VPP2, "*|-|*|E"),
    "DP2": Layout(2, {}, MOE),
    "DP2 overlapped": Layout(2, {}, MOE, ddp=OVERLAP, optimizer={"overlap_param_gather": True}),
    "DP2 without distributed optimizer": Layout(
        2,
        {},
        MOE,
        ddp={"use_distributed_optimizer": False},
        optimizer={"use_distributed_optimizer": False},
    ),
    "EP2": Layout(2, {"expert_model_parallel_size": 2}, MOE),
}


def save_and_train(layout: Layout, folder: str) -> list[tuple[float, float]]:
    run = engine.build(layout)
    engine.train(run, range(2))
    engine.save(run, folder)
    return engine.train(run, range(2, 5))


def load_and_train(layout: Layout, folder: str, weights_only: bool) -> list[tuple[float, float]]:
    run = engine.build(layout)
    engine.load(run, folder, weights_only=weights_only)
    return engine.train(run, range(2, 5))


@pytest.fixture(scope="module")
def moe_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[float, float]]]:
    """A checkpoint of one rank after two steps, and how that rank went on."""
    folder = str(tmp_path_factory.mktemp("moe"))
    return folder, run_distributed(save_and_train, 1, Layout(), folder)[0]


@pytest.fixture(scope="module")
def moe_checkpoint(moe_run: tuple[str, list[tuple[float, float]]]) -> str:
    return moe_run[0]


@pytest.fixture(scope="module")
def one_rank_resumed(moe_run: tuple[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    return moe_run[1]


@pytest.fixture(scope="module")
def one_rank(moe_checkpoint: str) -> list[tuple[float, float]]:
    return run_distributed(load_and_train, 1, Layout(), moe_checkpoint, weights_only=True)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_rank(
    name: str,
    moe_checkpoint: str,
    one_rank: list[tuple[float, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses and gradient norms of three steps, from the same weights, agree on every rank.

    Nothing is printed: the engine's warnings about what only a GPU has do not reach a user.
    """
    layout = LAYOUTS[name]
    ranks = run_distributed(load_and_train, 2, layout, moe_checkpoint, weights_only=True)
    assert ranks[0] == ranks[1]
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(torch.tensor(ranks[0]), torch.tensor(one_rank), rtol=1e-5, atol=0)


def save_in_background(layout: Layout, folder: str) -> list[tuple[float, float]]:
    run = engine.build(layout)
    engine.train(run, range(2))
    calls = engine.start_saving(run, folder)
    history = engine.train(run, range(2, 5))
    calls.maybe_finalize_async_calls(blocking=True)
    return history


@pytest.mark.parametrize("save", [save_and_train, save_in_background])
def test_checkpoint_of_tp2_goes_on_in_other_layouts(save, tmp_path: Path) -> None:
    """Model and optimizer saved by TP2, at once or while it trains on, resume in other layouts.

    The background writer is forked: what it writes is the state at the fork, although the rank
    changes its parameters meanwhile.
    """
    tp2 = LAYOUTS["TP2 with sequence parallelism"]
    expected = torch.tensor(run_distributed(save, 2, tp2, str(tmp_path))[0])
    for layout in (tp2, Layout(), LAYOUTS["DP2"], LAYOUTS["PP2"], LAYOUTS["EP2"]):
        history = run_distributed(
            load_and_train, layout.world_size, layout, str(tmp_path), weights_only=False
        )[0]
        torch.testing.assert_close(torch.tensor(history), expected, rtol=1e-5, atol=0)


def test_checkpoint_of_one_rank_goes_on_in_ep2(
    moe_checkpoint: str, one_rank_resumed: list[tuple[float, float]]
) -> None:
    """One optimizer's state goes into the two that expert parallelism makes of it."""
    ep2 = LAYOUTS["EP2"]
    history = run_distributed(load_and_train, 2, ep2, moe_checkpoint, weights_only=False)[0]
    expected = torch.tensor(one_rank_resumed)
    torch.testing.assert_close(torch.tensor(history), expected, rtol=1e-5, atol=0)


def same_after_resuming(folder: str) -> tuple[bool, int]:
    run = engine.build(Layout(pattern=DENSE))
    engine.train(run, range(2))
    engine.save(run, folder)
    engine.train(run, range(2, 4))
    straight = [p.clone() for p in run.chunks[0].parameters()]
    engine.load(run, folder)
    engine.train(run, range(2, 4))
    resumed = run.chunks[0].parameters()
    steps = [g["step"] for g in run.optimizer.optimizer.param_groups]
    return all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True)), steps[0]


def test_resuming_is_exact(tmp_path: Path) -> None:
    """Saved and loaded, the optimizer goes on to the same bits, its step count included."""
    assert run_distributed(same_after_resuming, 1, str(tmp_path)) == [(True, 4)]


def train_bf16(distributed_optimizer: bool) -> tuple[list[tuple[float, float]], set[str]]:
    flag = {"use_distributed_optimizer": distributed_optimizer}
    config = {"bf16": True, "params_dtype": torch.bfloat16}
    run = engine.build(Layout(2, {}, MOE, config=config, ddp=flag, optimizer=flag))
    history = engine.train(run, range(6))
    return history, {str(p.dtype) for p in run.optimizer.get_parameters()}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_bf16_trains_with_fp32_main_parameters(distributed_optimizer: bool) -> None:
    """bf16 weights are sorted as such, with fp32 copies that the optimizer steps."""
    (history, dtypes), _ = run_distributed(train_bf16, 2, distributed_optimizer)
    assert dtypes == {"torch.float32"}
    expected = run_distributed(load_free, 1)[0]
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=0.05, atol=0)


def load_free() -> list[tuple[float, float]]:
    return engine.train(engine.build(Layout()), range(6))


def train_with_dropout(recompute: bool) -> list[tuple[float, float]]:
    config: dict = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    if recompute:
        config |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return engine.train(engine.build(Layout(config=config)), range(3))


def test_recomputation_draws_the_same_dropout() -> None:
    """The random state that recomputation puts back makes it equal, to the bit, to none."""
    (plain,) = run_distributed(train_with_dropout, 1, recompute=False)
    (recomputed,) = run_distributed(train_with_dropout, 1, recompute=True)
    (without,) = run_distributed(load_free, 1)
    assert plain == recomputed
    assert plain != without[:3]
