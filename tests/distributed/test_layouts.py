"""Every layout computes what one rank computes: losses, gradient norms and every gradient."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    AHEAD,
    DELTA,
    DENSE,
    DIFFUSION,
    HEADS,
    HYMBA,
    LAYOUTS,
    MOE,
    ONE_RANK,
    PASSING,
    STATES,
    UNLIKE,
    Layout,
    Variant,
    merge_gradients,
    save_weights,
    steps_of_variant,
    train_variants,
)

RELATIVE_TOLERANCE = 1e-5

VARIANTS = [Variant(packed, again) for packed in (False, True) for again in (False, True)]
PLAIN, PACKED_AGAIN = VARIANTS[0], VARIANTS[-1]
SFT = Variant(packed=True, sft=True)
# Another objective meets no other code than that of single dimensions.
SINGLE = ("TP2+SP", "PP2", "CP2", "EP2")
# It has no experts, and too few layers for virtual stages; DP meets no code of its own.
HYMBA_LAYOUTS = ("TP2+SP", "PP2", "CP2", "TP2xCP2")
# What multi-token prediction adds is after the last layer.
AHEAD_LAYOUTS = (*SINGLE, "PP2xVPP2", "TP2xCP2", "DP2 overlapped")
Steps = list[tuple[float, float, dict[str, Tensor]]]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint by one rank for each model."""
    folders = {}
    for layers in (DENSE, MOE, DIFFUSION, UNLIKE, HEADS, HYMBA, DELTA, STATES, AHEAD):
        folders[layers] = tmp_path_factory.mktemp("weights")
        run_distributed(save_weights, 1, layers, folders[layers])
    return folders


@cache
def steps_of(layout: Layout, layers: str, weights: Path) -> dict[Variant, Steps]:
    """By variant, the steps of a layout, with the gradients of the whole model."""
    variants = variants_of(layout, layers)
    of_ranks = run_distributed(
        train_variants, layout.ranks, layout, layers, weights, variants, timeout_s=300
    )
    return {
        variant: [
            (step[0][0], step[0][1], merge_gradients([rank[2] for rank in step]))
            for step in zip(*ranks, strict=True)
        ]
        for variant, ranks in zip(variants, zip(*of_ranks, strict=True), strict=True)
    }


def variants_of(layout: Layout, layers: str) -> list[Variant]:
    """Those in which a layout is tried with a model."""
    if layout == PASSING[0] and layers == HYMBA:
        return [PLAIN]
    if layout.state_passing != (layers == STATES) and layout.ranks > 1:
        return []
    if layers == DIFFUSION and layout.ranks > 1 and layout.name not in SINGLE:
        return []
    if layers == DELTA and layout.segments > len(DELTA):
        return []
    if layers == HYMBA and layout.ranks > 1 and layout.name not in HYMBA_LAYOUTS:
        return []
    if layers in (HEADS, DELTA) and (layout.needs_moe or layout.name.startswith("DP2")):
        return []
    if layers == AHEAD and layout.ranks > 1 and layout.name not in AHEAD_LAYOUTS:
        return []
    if layers in (UNLIKE, HEADS, HYMBA, DELTA, STATES, AHEAD) and layout.ranks > 1:
        return [PLAIN, PACKED_AGAIN]
    if layers == DENSE and layout.ranks > 1 and layout.name not in (*SINGLE, "DP2"):
        return []  # of more dimensions: UNLIKE has all kinds of layers
    if layers != MOE:
        return [] if layout.needs_moe and layers == DENSE else VARIANTS
    return [*VARIANTS, SFT] if layout.ranks == 1 or layout.name in SINGLE else VARIANTS


NAMES = {DENSE: "dense", MOE: "moe", DIFFUSION: "diffusion", UNLIKE: "unlike",
         HEADS: "heads", HYMBA: "hymba", DELTA: "delta", AHEAD: "ahead",
         STATES: "states"}  # fmt: skip
CASES = [
    pytest.param(
        layout, layers, variant,
        id="-".join([layout.name, NAMES[layers],
                     *(name for name, chosen in variant._asdict().items() if chosen)]),
    )
    for layout in (ONE_RANK, *LAYOUTS, *PASSING)
    for layers in NAMES
    for variant in variants_of(layout, layers)
    if layout != ONE_RANK or variant.recompute
]  # fmt: skip


@pytest.mark.parametrize(("layout", "layers", "variant"), CASES)
def test_equals_one_rank(
    layout: Layout, layers: str, variant: Variant, weights: dict[str, Path]
) -> None:
    """Steps of training agree with one rank's, to 1e-5 of each gradient's norm."""
    one_rank = replace(ONE_RANK, batch=layout.batch)
    expected = steps_of(one_rank, layers, weights[layers])[variant._replace(recompute=False)]
    actual = steps_of(layout, layers, weights[layers])[variant]
    assert len(actual) == steps_of_variant(layout, variant)
    for (loss, norm, gradients), (ref_loss, ref_norm, ref_gradients) in zip(
        actual, expected, strict=False
    ):
        assert loss == pytest.approx(ref_loss, rel=RELATIVE_TOLERANCE)
        assert norm == pytest.approx(ref_norm, rel=RELATIVE_TOLERANCE)
        assert gradients.keys() == ref_gradients.keys()
        for key, reference in ref_gradients.items():
            # Biases of experts may have come back to where they began, on all ranks.
            size = reference.norm() or torch.ones(())
            error = (gradients[key] - reference).norm() / size
            assert error <= RELATIVE_TOLERANCE, f"{key}: relative error {error:.1e}"
