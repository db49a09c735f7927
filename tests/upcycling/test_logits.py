"""An upcycled model computes what the dense one did, where the paper's algebra says so exactly."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.errors import UserError
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.upcycling.request import Request
from tests.upcycling.models import (
    LAYOUTS,
    as_words,
    cut_in_two,
    dense_words,
    logits,
    train,
    upcycle,
)

# Of the logits' standard deviation, in fp32.
TOLERANCE = 1e-5
ACTIVATIONS = ("squared_relu", "swiglu", "gelu")


class Case(NamedTuple):
    """An upcycling after which the logits are the dense model's.

    A factor on the probabilities (`moe_router_topk_scaling_factor`) that makes up for them leaves
    weights unscaled, and so holds for activations that are not homogeneous.
    """

    name: str
    activation: str
    request: Request
    words: tuple[str, ...] = ()
    options: dict[str, Any] = {}


CASES = (
    Case(
        "topk-softmax T=G, padded", "squared_relu", Request(3, 4, 4, pre_softmax=False),
        ("model.make_vocab_size_divisible_by=48",),
    ),
    Case("topk-softmax T=G=1", "squared_relu", Request(2, 1, 1), options={"router_std": 0.0}),
    Case("zero router T=2G", "squared_relu", Request(3, 4, 8), options={"router_std": 0.0}),
    Case("zero router T=G", "squared_relu", Request(2, 6, 6), options={"router_std": 0.0}),
    Case(
        "some layers", "squared_relu", Request(2, 4, 4, layers=(2, 6), pre_softmax=False)
    ),
    Case("shared", "squared_relu", Request(4, 4, 3, shared_experts=1, pre_softmax=False)),
    Case(
        "shared, zero router", "squared_relu", Request(2, 4, 4, shared_experts=2),
        options={"router_std": 0.0},
    ),
    Case(
        "sigmoid", "squared_relu", Request(3, 4, 4, pre_softmax=False),
        ("model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true"),
        {"router_std": 0.0},
    ),
    *(
        Case(
            f"unscaled {activation}", activation,
            Request(2, 4, 3, shared_experts=1, pre_softmax=False),
            ("model.moe_router_topk_scaling_factor=3",),
        )
        for activation in ACTIVATIONS
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """By activation: a dense run of a few steps, and the logits of its last checkpoint."""
    found = {}
    for activation in ACTIVATIONS:
        run_dir = tmp_path_factory.mktemp("dense") / activation
        line = dense_words(run_dir, f"model.activation={activation}")
        run_distributed(train, 1, line)
        found[activation] = run_dir, run_distributed(logits, 1, line, find_checkpoint(run_dir))[0]
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    words = expected.shape[-1]  # the dense run's vocabulary is not padded
    assert (found[..., :words] - expected).abs().max() <= TOLERANCE * expected.std()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_dense_model(
    case: Case, dense: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """On one rank, logits of the upcycled checkpoint are the dense model's."""
    run_dir, expected = dense[case.activation]
    config, folder = upcycle(run_dir, tmp_path / "moe", case.request, *case.words, **case.options)
    found = run_distributed(logits, 1, as_words(config, tmp_path), folder)[0]
    assert_close(found, expected)


@pytest.mark.parametrize("layout", ["EP2", "TP2", "PP2"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=lambda case: case.name)
def test_equals_the_dense_model_in_a_layout(
    case: Case, layout: str, dense: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """The same on two ranks, from the checkpoint and from the dense one upcycled on the ranks."""
    run_dir, expected = dense[case.activation]
    config, folder = upcycle(run_dir, tmp_path / "moe", case.request, *case.words, **case.options)
    ranks, words = LAYOUTS[layout]
    if layout == "PP2":
        words = [*words, cut_in_two(config.model.hybrid_layer_pattern)]
    line = as_words(config, tmp_path, *words)
    found = run_distributed(logits, ranks, line, folder)
    assert_close(found[-1], expected)
    line = as_words(
        config, tmp_path, *words, f"upcycling.from={run_dir / 'checkpoints'}",
        *(f"upcycling.{name}={value}" for name, value in case.options.items()),
    )  # fmt: skip
    on_ranks = run_distributed(logits, ranks, line, find_checkpoint(run_dir), upcycle=True)
    assert torch.equal(on_ranks[-1], found[-1])


def test_mlps_that_are_alike_among_unlike_layers(tmp_path: Path) -> None:
    """Layers 4 and 6 become experts of their own width and activation; others, Mamba-1 and parallel
    heads with factors among them, keep their sizes, and an MLP of another width is refused."""
    sizes = ("model.layers={1: {mamba_version: 1, mamba_dt_rank: 3}, 3: {window_size: [7, 0]},"
             " 4-6: {ffn_hidden_size: 24, activation: squared_relu}}")  # fmt: skip
    line = dense_words(
        tmp_path / "dense", "training.train_iters=1", "model.activation=gelu", sizes,
        "model.hybrid_layer_pattern=M-H-M-", "model.ssm_out_multiplier=0.6",
    )  # fmt: skip
    run_distributed(train, 1, line)
    expected = run_distributed(logits, 1, line, find_checkpoint(tmp_path / "dense"))[0]
    request = Request(2, 4, 4, layers=(4, 6), pre_softmax=False)
    config, folder = upcycle(tmp_path / "dense", tmp_path / "moe", request)
    assert config.model.moe_ffn_hidden_size == 6
    assert_close(run_distributed(logits, 1, as_words(config, tmp_path), folder)[0], expected)
    with pytest.raises(UserError, match=r"ffn_hidden_size=24 must be model\.ffn_hidden_size=48"):
        upcycle(tmp_path / "dense", tmp_path / "all", Request(2, 4, 4))


def test_without_the_scale_it_is_another_model(
    dense: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """What the first case proves is not there by chance: unscaled, the logits are far off."""
    run_dir, expected = dense["squared_relu"]
    config, folder = upcycle(run_dir, tmp_path / "moe", CASES[0].request, scale_weights=False)
    found = run_distributed(logits, 1, as_words(config, tmp_path), folder)[0]
    assert (found - expected).abs().max() > 100 * TOLERANCE * expected.std()
