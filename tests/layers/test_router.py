"""The router: equal scores go to the lower expert, and tokens are counted where they went."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config.effects import EFFECTS
from megatron_hybrid.data.loader import _packed_batch, _plain_batch
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    ONE_RANK,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Layout,
    batches_of_this_rank,
    build,
    built,
    gradient_parts,
    in_groups,
    layout_config,
    merge_gradients,
    save_weights,
)

LAYOUT = {layout.name: layout for layout in (ONE_RANK, *LAYOUTS)}
PATTERN = "ME*E"
PAIRS = GLOBAL_BATCH_SIZE * SEQ_LENGTH * 2  # of a token and an expert, in a layer and step


def test_equal_scores_go_to_the_lower_expert() -> None:
    """Among equals the order is that of the indices, wherever they stand; values and gradients."""
    from megatron_hybrid.layers.router import stable_topk

    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    scores = torch.cat([scores, scores.repeat(500, 1)]).requires_grad_()
    values, indices = stable_topk(scores, 4)
    assert indices[:2].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert torch.equal(indices, indices[:2].repeat(501, 1))
    assert torch.equal(values, scores.gather(1, indices))
    values.sum().backward()
    assert scores.grad is not None
    assert scores.grad[:2].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_experts_of_open_groups() -> None:
    """The choice is megatron-core's; of groups and experts with equal scores, that of the lower."""
    from megatron.core.transformer.moe.moe_utils import group_limited_topk

    from megatron_hybrid.layers.router import _StableTopk

    scores = torch.rand(500, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores.requires_grad_()
    for groups, opened, topk in ((4, 2, 4), (3, 1, 3), (6, 3, 5), (4, 4, 6)):
        values, indices = _StableTopk().get_replay_topk(scores, topk, groups, opened)
        theirs, of_theirs = group_limited_topk(scores, topk, 500, 12, groups, opened)
        assert torch.equal(indices, of_theirs)
        assert torch.equal(values, theirs)
    [gradient] = torch.autograd.grad(values.sum(), scores)
    assert torch.equal(gradient, torch.zeros_like(scores).scatter(1, indices, 1.0))
    equal = torch.ones(3, 12)
    _, indices = _StableTopk().get_replay_topk(equal, 4, 4, 2)
    assert indices.tolist() == [[0, 1, 2, 3]] * 3


def test_the_balance_loss_counts_the_experts_that_are_taken() -> None:
    """Of equal scores too: the map that the loss sees is that of the choice."""
    from megatron_hybrid.layers.router import _map_of_topk, stable_topk

    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    scores = rows.repeat_interleave(4, dim=1).softmax(dim=1)  # four experts a copy, all alike
    found = _map_of_topk(scores, 2)
    _, indices = stable_topk(scores, 2)
    assert found.sum(1).tolist() == [2] * 300
    assert found.gather(1, indices).all()
    assert not found.view(300, 4, 4)[:, :, 2:].any()  # the later ones of a copy get nothing


def loads(
    layout: Layout, weights: Path, changes: dict[str, Any], recompute: bool
) -> tuple[Any, list[int]]:
    """On a rank: the load of one training step, and the layers that have counts left after it."""
    from megatron_hybrid.layers.router import TopKRouter
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    config = layout_config(layout, PATTERN, packed=False, recompute=recompute)
    model = config.model.model_copy(update=changes)
    with built(config.model_copy(update={"model": model})) as (chunks, optimizer, stepper):
        load_checkpoint(config, weights, chunks, optimizer, weights_only=True)
        shape = BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
        batches = batches_of_this_rank(packed=False)
        stepper.evaluate(batches_of_this_rank(packed=False), [shape])  # which must not count
        load = stepper.train(batches, shape, float("inf"), []).readings["expert_load"]
        left = [
            module.layer_number
            for chunk in chunks
            for module in chunk.modules()
            if isinstance(module, TopKRouter) and module.load is not None
        ]
        return load, left


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that every layout starts from."""
    folder = tmp_path_factory.mktemp("weights")
    run_distributed(save_weights, 1, PATTERN, folder)
    return folder


@pytest.fixture(scope="module")
def on_one_rank(weights: Path) -> Any:
    return run_distributed(loads, 1, ONE_RANK, weights, {}, False)[0][0]


def test_every_token_is_counted_once(on_one_rank: Any) -> None:
    """Each MoE layer, by its number in the pattern, took top-k times the tokens of the step."""
    assert on_one_rank.layers == (2, 4)
    assert on_one_rank.tokens.sum(axis=1).tolist() == [PAIRS] * 2
    assert on_one_rank.asked.tolist() == [PAIRS] * 2
    assert on_one_rank.dropped.tolist() == [0.0, 0.0]
    assert (on_one_rank.max_over_mean >= 1).all()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["TP2+SP", "PP2", "PP2xVPP2", "CP2", "DP2", "EP2"])
def test_counts_of_a_layout_are_those_of_one_rank(
    name: str, recompute: bool, on_one_rank: Any, weights: Path
) -> None:
    """The same tokens on the same experts, whoever routed them; recomputation counts nothing."""
    layout = LAYOUT[name]
    for load, left in run_distributed(loads, layout.ranks, layout, weights, {}, recompute):
        assert load.layers == on_one_rank.layers
        # Rounding may send a token whose scores are all but equal elsewhere.
        assert abs(load.tokens - on_one_rank.tokens).sum() <= 4
        assert load.asked.tolist() == on_one_rank.asked.tolist()
        assert left == []


def test_what_full_experts_drop_is_counted(weights: Path) -> None:
    """With half of an even share as capacity, no expert takes more, and the rest is dropped."""
    changes = {"moe_expert_capacity_factor": 0.5}
    load, _ = run_distributed(loads, 1, ONE_RANK, weights, changes, False)[0]
    assert load.tokens.max() <= PAIRS / 4 * 0.5
    assert (load.dropped >= 0.5).all()
    assert load.asked.tolist() == [PAIRS] * 2


# For each field that is of training alone, a value under which training is another function.
TRAINING_ONLY: dict[str, Any] = {
    "model.hidden_dropout": 0.5,
    "model.attention_dropout": 0.5,
    "model.moe_expert_capacity_factor": 0.5,
    "model.moe_aux_loss_coeff": 5.0,
    "model.moe_z_loss_coeff": 5.0,
    "model.moe_router_load_balancing_type": "seq_aux_loss",
    "model.mtp_loss_scaling_factor": 5.0,
}


def evaluations(layout: Layout, weights: Path) -> dict[str, list[float]]:
    """On a rank: the loss of an evaluation, as the config is ("") and with each of these values,
    in micro batches of 1 and 2 (over several ranks of 2)."""
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    losses: dict[str, list[float]] = {}
    config = layout_config(layout, PATTERN, packed=False, recompute=False)
    with in_groups(config):
        for name, value in ({"": None} | TRAINING_ONLY).items():
            changes = {name.removeprefix("model."): value} if name else {}
            model = config.model.model_copy(update=changes)
            for size in (1, 2) if layout.ranks == 1 else (2,):
                training = config.training.model_copy(update={"micro_batch_size": size})
                update = {"model": model, "training": training}
                chunks, _, stepper = build(config.model_copy(update=update))
                load_checkpoint(config, weights, chunks, None, weights_only=True)
                rows = torch.arange(GLOBAL_BATCH_SIZE * (SEQ_LENGTH + 1)) * 7 % VOCAB_SIZE
                parts = rows.view(GLOBAL_BATCH_SIZE, -1).split(size)
                shape = BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
                loss = stepper.evaluate(iter([_plain_batch(part) for part in parts]), [shape]).loss
                losses.setdefault(name, []).append(loss)
    return losses


@pytest.mark.parametrize("name", ["one rank", "TP2xCP2"])
def test_what_is_of_training_alone_is_off_in_evaluations(name: str, weights: Path) -> None:
    """Dropout, dropped tokens and auxiliary losses change no evaluation, in any layout or micro
    batch; generation and exports compute the same function."""
    effects = {field for field, effect in EFFECTS.items() if effect == "training"}
    assert TRAINING_ONLY.keys() == effects
    for losses in run_distributed(evaluations, LAYOUT[name].ranks, LAYOUT[name], weights):
        for field, values in losses.items():
            assert values == pytest.approx([losses[""][0]] * len(values), rel=1e-6), field


def balance(layout: Layout, weights: Path, micro_batches: list[int]) -> list[Any]:
    """On a rank, for each size of the micro batch: the auxiliary losses of a step, and this rank's
    parts of the gradients, of the same four samples in packed rows."""
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    draws = torch.Generator().manual_seed(3)
    rows = torch.randint(1, VOCAB_SIZE, (GLOBAL_BATCH_SIZE, SEQ_LENGTH + 1), generator=draws)
    rows[:, 20] = ~rows[:, 20]  # a document ends there
    results = []
    config = layout_config(layout, PATTERN, packed=True, recompute=False)
    types = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 5.0}
    model = config.model.model_copy(update=types)
    with in_groups(config):
        for size in micro_batches:
            training = config.training.model_copy(update={"micro_batch_size": size})
            sections = {"model": model, "training": training}
            chunks, optimizer, stepper = build(config.model_copy(update=sections))
            load_checkpoint(config, weights, chunks, optimizer, weights_only=True)
            data = iter([_packed_batch(part, conversations=False) for part in rows.split(size)])
            shape = BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
            step = stepper.train(data, shape, float("inf"), [])
            results.append((step.readings["moe_losses"], gradient_parts(chunks)))
    return results


def test_the_balance_loss_of_a_sample_knows_no_packing(weights: Path) -> None:
    """One row of four samples has the auxiliary losses and gradients of four rows of one, on one
    rank and where the row is cut over tensor and context parallel ranks."""
    sizes = [1, 2, 4]
    (whole,) = run_distributed(balance, 1, ONE_RANK, weights, sizes)
    losses, parts = whole[0]
    expected = merge_gradients([parts])
    assert losses["seq_load_balancing_loss"] > 1
    layout = LAYOUT["TP2xCP2"]
    cut = run_distributed(balance, layout.ranks, layout, weights, sizes)
    for ranks in (*([found] for found in whole), *zip(*cut, strict=True)):
        assert ranks[0][0] == pytest.approx(losses, rel=1e-5)
        gradients = merge_gradients([parts for _, parts in ranks])
        for key, reference in expected.items():
            assert (gradients[key] - reference).norm() <= 1e-5 * reference.norm(), key
