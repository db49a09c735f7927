"""Every layout computes what one rank computes: losses, gradient norms and every gradient."""

from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    DENSE,
    DIFFUSION,
    LAYOUTS,
    MOE,
    ONE_RANK,
    Layout,
    merge_gradients,
    save_weights,
    train_variants,
)

RELATIVE_TOLERANCE = 1e-5

VARIANTS = [(packed, recompute) for packed in (False, True) for recompute in (False, True)]
Steps = list[tuple[float, float, dict[str, Tensor]]]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint by one rank for each model."""
    folders = {}
    for layers in (DENSE, MOE, DIFFUSION):
        folders[layers] = tmp_path_factory.mktemp("weights")
        run_distributed(save_weights, 1, layers, folders[layers])
    return folders


@cache
def steps_of(layout: Layout, layers: str, weights: Path) -> dict[tuple[bool, bool], Steps]:
    """{(packed, recompute): the steps of a layout, with the gradients of the whole model}."""
    of_ranks = run_distributed(
        train_variants, layout.ranks, layout, layers, weights, VARIANTS, timeout_s=300
    )
    return {
        variant: [
            (step[0][0], step[0][1], merge_gradients([rank[2] for rank in step]))
            for step in zip(*ranks, strict=True)
        ]
        for variant, ranks in zip(VARIANTS, zip(*of_ranks, strict=True), strict=True)
    }


def trained(layout: Layout, layers: str) -> bool:
    """Whether a layout is tried with a model; another objective meets no other code than that of
    single dimensions."""
    if layers == DIFFUSION:
        return layout.name in ("TP2+SP", "PP2", "CP2", "EP2")
    return layers == MOE or not layout.needs_moe


NAMES = {DENSE: "dense", MOE: "moe", DIFFUSION: "diffusion"}
CASES = [
    pytest.param(
        layout, layers, packed, recompute,
        id=f"{layout.name}-{NAMES[layers]}"
        f"{'-packed' if packed else ''}{'-recompute' if recompute else ''}",
    )
    for layout in (ONE_RANK, *LAYOUTS)
    for layers in NAMES
    for packed, recompute in VARIANTS
    if trained(layout, layers) and (layout != ONE_RANK or recompute)
]  # fmt: skip


@pytest.mark.parametrize(("layout", "layers", "packed", "recompute"), CASES)
def test_equals_one_rank(
    layout: Layout, layers: str, packed: bool, recompute: bool, weights: dict[str, Path]
) -> None:
    """Two steps of training agree with one rank's, to 1e-5 of each gradient's norm."""
    expected = steps_of(ONE_RANK, layers, weights[layers])[packed, False]
    actual = steps_of(layout, layers, weights[layers])[packed, recompute]
    for (loss, norm, gradients), (ref_loss, ref_norm, ref_gradients) in zip(
        actual, expected, strict=True
    ):
        assert loss == pytest.approx(ref_loss, rel=RELATIVE_TOLERANCE)
        assert norm == pytest.approx(ref_norm, rel=RELATIVE_TOLERANCE)
        assert gradients.keys() == ref_gradients.keys()
        for key, reference in ref_gradients.items():
            error = (gradients[key] - reference).norm() / reference.norm()
            assert error <= RELATIVE_TOLERANCE, f"{key}: relative error {error:.1e}"
