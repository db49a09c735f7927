"""Where megatron-core can upcycle, it comes to the same weights: attention and MLPs, one rank.

Its utility takes the first layer for one that is upcycled, so that the pattern begins with an MLP.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.upcycling.request import Request
from tests.upcycling.models import as_words, build, dense_words, loaded, train, upcycle


def states_of_both(
    dense_line: list[str], dense: Path, moe_line: list[str], moe: Path
) -> list[dict[str, Tensor]]:
    """On a rank: the state that megatron-core's utility makes of the dense model, and ours."""
    from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict

    with loaded(dense_line, dense) as (_, dense_model):
        # The groups of the dense layout are those of the MoE model on one rank.
        moe_model = build(moe_line, moe)
        theirs = upcycle_state_dict([moe_model], [dense_model])["model"]
        return [
            {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            for state in (theirs, moe_model.state_dict())
        ]


@pytest.mark.parametrize("pre_softmax", [True, False], ids=["softmax-topk", "topk-softmax"])
@pytest.mark.parametrize("activation", ["squared_relu", "swiglu", "gelu"])
def test_same_weights_as_the_engine(activation: str, pre_softmax: bool, tmp_path: Path) -> None:
    """Experts and all that is copied are equal; of the router, that its rows repeat alike."""
    dense_line = dense_words(
        tmp_path / "dense", f"model.activation={activation}", "model.hybrid_layer_pattern=-*-*",
        "training.train_iters=1",
    )  # fmt: skip
    run_distributed(train, 1, dense_line)
    request = Request(experts=3, granularity=4, topk=4, pre_softmax=pre_softmax)
    config, folder = upcycle(tmp_path / "dense", tmp_path / "moe", request)
    theirs, ours = run_distributed(
        states_of_both, 1, dense_line, find_checkpoint(tmp_path / "dense"),
        as_words(config, tmp_path), folder,
    )[0]  # fmt: skip
    assert theirs.keys() >= ours.keys()
    experts = [name for name in ours if "experts" in name]
    assert len(experts) == 2 * 12 * 2
    for name, value in ours.items():
        if "router" in name:
            copies = value.view(3, 4, -1)
            assert torch.equal(copies, copies[:, :1].expand_as(copies))
            assert torch.equal(theirs[name].view(3, 4, -1)[:, 0], theirs[name].view(3, 4, -1)[:, 3])
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=0)
