"""MoE losses and the parameter norm: equal in every layout, and worked out anew for each step."""

import math
from pathlib import Path

import pytest
import torch

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    MOE,
    ONE_RANK,
    SEQ_LENGTH,
    Layout,
    batches_of_this_rank,
    built,
    layout_config,
    save_weights,
)
from tests.training import runs

NAMES = {"load_balancing_loss", "z_loss"}


def extras(layout: Layout, weights: Path, balance: str) -> list[dict[str, float]]:
    """On a rank: what two steps and an evaluation between them leave in the log."""
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.extras import params_norm
    from megatron_hybrid.training.step import BatchShape

    config = layout_config(layout, MOE, packed=False, recompute=balance == "aux_loss")
    model_config = config.model.model_copy(update={"moe_router_load_balancing_type": balance})
    config = config.model_copy(update={"model": model_config})
    found, shape = [], BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    with built(config) as (model, optimizer, stepper):
        load_checkpoint(config, weights, model, optimizer, weights_only=True)
        data = batches_of_this_rank(packed=False)
        for _ in range(2):
            result = stepper.train(data, shape, math.inf, [])
            found.append({**result.readings["moe_losses"], "params_norm": params_norm(optimizer)})
            stepper.evaluate(batches_of_this_rank(packed=False), [shape])
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    run_distributed(save_weights, 1, MOE, folder)
    return folder


@pytest.fixture(scope="module")
def one_rank(weights: Path) -> list[dict[str, float]]:
    return list(run_distributed(extras, 1, ONE_RANK, weights, "aux_loss")[0])


@pytest.mark.parametrize(
    "layout", [each for each in LAYOUTS if each.name in ("TP2+SP", "PP2", "CP2", "EP2", "PP2xEP2")],
    ids=lambda layout: layout.name,
)  # fmt: skip
def test_layouts_agree(layout: Layout, one_rank: list[dict[str, float]], weights: Path) -> None:
    """Every rank of a layout, those of a stage without MoE too, reports what one rank does."""
    for found in run_distributed(extras, layout.ranks, layout, weights, "aux_loss"):
        for step, expected in zip(found, one_rank, strict=True):
            # Balance is a property of a micro batch: a single sample in every layout here.
            assert step == pytest.approx(expected, rel=1e-5)


def test_each_step_has_its_own(one_rank: list[dict[str, float]]) -> None:
    """With hardly another model, the second step's losses are about the first's, not their sum."""
    first, second = one_rank
    assert first.keys() == NAMES | {"params_norm"}
    for name in NAMES:
        assert first[name] > 0
        assert second[name] == pytest.approx(first[name], rel=0.2)
        assert second[name] != first[name]


def test_balance_over_sequences_has_its_own_name(weights: Path) -> None:
    """seq_aux_loss is reported under megatron-core's name; of single samples it is the same."""
    names = run_distributed(extras, 1, ONE_RANK, weights, "seq_aux_loss")[0][0].keys()
    assert names == {"seq_load_balancing_loss", "z_loss", "params_norm"}


def by_hand(line: list[str]) -> tuple[float, float]:
    """On a rank: the z-loss of the only step and the norm after it, from the model itself."""
    with runs.trainer(line) as run:
        squares: list[float] = []
        (router,) = (m for m in run.model[0].modules() if type(m).__name__ == "TopKRouter")
        routing = router.routing

        def watched(logits: torch.Tensor, *args: object, **kwargs: object) -> object:
            squares.append(float(torch.logsumexp(logits.detach(), -1).square().mean()))
            return routing(logits, *args, **kwargs)

        router.routing = watched
        run.run()
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in run.model[0].parameters()))
        return sum(squares) / len(squares), norm


def test_what_is_logged(tmp_path: Path) -> None:
    """metrics.jsonl holds the values that the routers' logits and the parameters give by hand."""
    line = runs.words(
        tmp_path, *runs.MOE, "training.train_iters=1", "training.micro_batch_size=2",
        "logging.log_params_norm=true",
    )  # fmt: skip
    z_loss, norm = run_distributed(by_hand, 1, line)[0]
    extra = runs.records(tmp_path)[0]["extra"]
    assert extra.keys() == NAMES | {"params_norm"}
    assert extra["z_loss"] == pytest.approx(z_loss, rel=1e-6)
    assert extra["params_norm"] == pytest.approx(norm, rel=1e-6)
