"""What ranks draw for themselves: other weights where they are others, the same where not."""

from typing import Any

import torch

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import LAYOUTS, Layout, built, layout_config

EQUAL_STAGES = "M-M-"


def drawn_weights(layout: Layout) -> dict[str, torch.Tensor]:
    """On a rank: its freshly drawn parameters, by their names within the rank."""
    config = layout_config(layout, EQUAL_STAGES, packed=False, recompute=False)
    with built(config) as (model, _, _):
        return {name: p.detach().clone() for name, p in model[0].named_parameters()}


def _layout(name: str) -> Any:
    return next(layout for layout in LAYOUTS if layout.name == name)


def test_equal_pipeline_stages_differ() -> None:
    """Two stages with the same layers draw other weights."""
    first, second = run_distributed(drawn_weights, 2, _layout("PP2"))
    shared = [name for name in first if name in second and "decoder.layers" in name]
    drawn = [name for name in shared if first[name].unique().numel() > 1]
    assert len(drawn) >= 6
    for name in drawn:
        assert not torch.equal(first[name], second[name]), name


def test_tensor_ranks_draw_other_shards() -> None:
    """Parts of one matrix differ; what is not split over TP is the same."""
    first, second = run_distributed(drawn_weights, 2, _layout("TP2+SP"))
    for name, weight in first.items():
        split = weight.unique().numel() > 1
        assert torch.equal(weight, second[name]) != split, name


def test_replicas_draw_the_same() -> None:
    """Data-parallel and context-parallel ranks start from the same weights."""
    for name in ("DP2", "CP2"):
        first, second = run_distributed(drawn_weights, 2, _layout(name))
        assert all(torch.equal(weight, second[key]) for key, weight in first.items())
