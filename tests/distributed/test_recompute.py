"""Parts of layers that are computed again: to the bit what they were, and really again."""

from collections import Counter
from typing import Any

import pytest
import torch

from megatron_hybrid.config import RunConfig
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    LAYOUTS,
    ONE_RANK,
    SEQ_LENGTH,
    Layout,
    batches_of_this_rank,
    built,
    layout_config,
)

LAYERS = "*-ME"
TP2 = next(layout for layout in LAYOUTS if layout.name == "TP2+SP")
# Modules, and by the end of their names how often what is computed twice is called.
VARIANTS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (".core_attention",),
    ("core_attn",): (".core_attention",),
    ("mlp",): ("layers.1.mlp.linear_fc1", "layers.1.mlp.linear_fc2"),
    ("moe",): (".router", ".experts", ".shared_experts"),
    ("shared_experts",): (".shared_experts",),
    ("core_attn", "mlp", "shared_experts"): (".core_attention", ".shared_experts"),
}


def with_modules(config: RunConfig, modules: tuple[str, ...] | None) -> RunConfig:
    """A run with dropout; None: nothing is computed again."""
    again = {"recompute_modules": modules or (), "recompute_granularity": "selective"}
    training = config.training.model_copy(update=again if modules is not None else {})
    dropout = {
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "moe_shared_expert_intermediate_size": 32,
    }  # fmt: skip
    model = config.model.model_copy(update=dropout)
    return config.model_copy(update={"training": training, "model": model})


def step(layout: Layout, modules: tuple[str, ...] | None) -> tuple[list[Any], Counter[str]]:
    """On a rank: what a step found, its gradients, and how often each module was called."""
    from megatron_hybrid.training.step import BatchShape

    config = with_modules(layout_config(layout, LAYERS, packed=False, recompute=False), modules)
    calls: Counter[str] = Counter()
    with built(config) as (model, _, stepper):
        for name, module in model[0].named_modules():
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        shape = BatchShape(layout.batch, SEQ_LENGTH)
        result = stepper.train(
            batches_of_this_rank(False, batch=layout.batch), shape, float("inf"), []
        )
        loads, losses = result.readings["expert_load"], result.readings["moe_losses"]
        return [
            result.loss, result.grad_norm, losses, loads.tokens.tolist(),
            *(p.main_grad.clone() for p in model[0].parameters()),
        ], calls  # fmt: skip


def steps(layout: Layout) -> list[tuple[list[Any], Counter[str]]]:
    """On a rank: without recomputation, then each variant."""
    return [step(layout, modules) for modules in (None, *VARIANTS)]


@pytest.mark.parametrize("layout", [ONE_RANK, TP2], ids=lambda layout: layout.name)
def test_modules(layout: Layout) -> None:
    """Loss, counts of experts and all gradients, dropout included; what is named runs twice."""
    for (plain, once), *others in run_distributed(steps, layout.ranks, layout):
        assert len(others) == len(VARIANTS)
        for (modules, ends), (found, calls) in zip(VARIANTS.items(), others, strict=True):
            assert found[:4] == plain[:4], modules
            for got, want in zip(found[4:], plain[4:], strict=True):
                assert torch.equal(got, want), modules
            for end in ends:
                names = [name for name in once if name.endswith(end)]
                assert names, end
                assert {name: calls[name] for name in names} == {
                    name: 2 * once[name] for name in names
                }, modules
