"""Runs that differ in the padding of the vocabulary alone: the same losses and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.testing import run_distributed
from tests.distributed import layouts
from tests.distributed.layouts import (
    LAYOUTS,
    ONE_RANK,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Layout,
    batches_of_this_rank,
    built,
    gradient_parts,
    layout_config,
    merge_gradients,
)

EVEN = "M-M*"
TOLERANCE = 1e-6
# Of a gradient over ranks: words fall on other ranks, which round other partial sums.
OF_RANKS = {1: TOLERANCE, 2: 2e-6}
# Of one rank, some rows of the last rank, and all of them.
PADDINGS = {1: (1, 32, 512), 2: (2, 32, 512)}
LAYOUT = {layout.name: layout for layout in (ONE_RANK, *LAYOUTS)}
# (layout, untied, recipe). With TP in bf16 ranks add up rounded parts, of other words each.
CASES = {
    1: [("one rank", untied, recipe) for untied in (True, False) for recipe in ("fp32", "bf16")],
    2: [("TP2+SP", True, "fp32"), ("TP2+SP", False, "fp32"),
        ("PP2", True, "fp32"), ("PP2", False, "fp32")],
}  # fmt: skip


def padded(config: RunConfig, multiple: int, **model: Any) -> RunConfig:
    """The config with another padding, and other fields of the model."""
    changes = {"make_vocab_size_divisible_by": multiple, **model}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def first_step(layout: Layout, untied: bool, recipe: str, multiple: int) -> dict[str, Any]:
    """On a rank: what a run from scratch evaluates to, and its first step."""
    from megatron_hybrid.training.extras import params_norm
    from megatron_hybrid.training.step import BatchShape

    config = layout_config(layout, EVEN, packed=False, recompute=False)
    # The modules of multi-token prediction read and predict words too.
    ahead = {"mtp_num_layers": 1, "mtp_hybrid_override_pattern": "M*"} if untied else {}
    config = padded(config, multiple, untie_embeddings_and_output_weights=untied, **ahead)
    precision = config.precision.model_copy(update={"recipe": recipe})
    config = config.model_copy(update={"precision": precision})
    shape = BatchShape(layout.batch, SEQ_LENGTH)
    with built(config) as (model, optimizer, stepper):
        evaluated = stepper.evaluate(batches_of_this_rank(False, batch=layout.batch), [shape])
        result = stepper.train(batches_of_this_rank(False, batch=layout.batch), shape, math.inf, [])
        gradients = gradient_parts(model)
        norms = (result.grad_norm, params_norm(optimizer))
        again = stepper.evaluate(batches_of_this_rank(False, batch=layout.batch), [shape])
        logits = _logits(model, multiple) if layout.ranks == 1 else None
        rows = _rows(model)
        return {
            "losses": [evaluated.loss, result.loss, again.loss], "norms": norms,
            "gradients": gradients, "logits": logits, "rows": rows,
        }  # fmt: skip


def _logits(model: list[Any], multiple: int) -> Tensor:
    """Of the words; those of the padding are never chosen."""
    tokens = torch.arange(SEQ_LENGTH)[None]
    with torch.no_grad():
        logits = model[0].eval()(tokens, tokens, None)
    assert logits.shape[-1] % multiple == 0
    assert (logits[..., VOCAB_SIZE:] < -1e29).all()
    return logits[..., :VOCAB_SIZE].clone()


def _rows(model: list[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """This rank's parts of the vocabulary's matrices, as `gradient_parts` has gradients."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_hybrid.training.checkpoint_state import model_state, tensor_layout

    parts: dict[str, list[tuple[Any, ...]]] = {}
    for tensor in nested_values(model_state(model, tensor_layout())):
        key = getattr(tensor, "key", "")
        if "embedding" in key or key.startswith("output_layer.weight"):
            place = (tensor.global_shape, tensor.global_offset, tensor.data.detach().clone())
            parts.setdefault(key, []).append(place)
    return parts


def first_steps(ranks: int) -> list[list[dict[str, Any]]]:
    """On a rank: `first_step` of every case with every padding."""
    return [
        [first_step(LAYOUT[name], untied, recipe, multiple) for multiple in PADDINGS[ranks]]
        for name, untied, recipe in CASES[ranks]
    ]


@pytest.mark.parametrize("ranks", CASES)
def test_padding_is_neutral(ranks: int) -> None:
    """From scratch too: losses of evaluation and training, gradients, norms, logits; a run begins
    at the log of the true size, and the padding's rows are 0 and stay so.
    """
    of_ranks = run_distributed(first_steps, ranks, ranks)
    for number, case in enumerate(CASES[ranks]):
        found = [[rank[number][i] for rank in of_ranks] for i in range(len(PADDINGS[ranks]))]
        first = found[0][0]
        assert first["losses"][0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.05)
        gradients = merge_gradients([rank["gradients"] for rank in found[0]])
        for other in found[1:]:
            for rank in other:
                assert rank["losses"] == pytest.approx(first["losses"], rel=TOLERANCE), case
                assert rank["norms"] == pytest.approx(first["norms"], rel=TOLERANCE), case
                if first["logits"] is not None:
                    torch.testing.assert_close(rank["logits"], first["logits"])
            others = merge_gradients([rank["gradients"] for rank in other])
            assert others.keys() == gradients.keys()
            for key, gradient in gradients.items():
                mine, padding = _cut(key, others[key])
                expected, _ = _cut(key, gradient)
                error = (mine - expected).norm() / expected.norm()
                assert error <= OF_RANKS[ranks], (case, key)
                assert (padding == 0).all(), (case, key)
            for key, rows in merge_gradients([rank["rows"] for rank in other]).items():
                words, padding = _cut(key, rows)
                assert len(padding) and (padding == 0).all(), (case, key)
                assert (words != 0).any(1).all(), (case, key)


def _cut(key: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of words, and of padding."""
    vocabulary = "embedding" in key or key.startswith("output_layer")
    return (tensor[:VOCAB_SIZE], tensor[VOCAB_SIZE:]) if vocabulary else (tensor, tensor[:0])


def test_the_layouts_are_tried_with_padding() -> None:
    """What other tests compare over layouts has padding in it, and on one TP rank alone."""
    rows = layout_config(ONE_RANK, EVEN, packed=False, recompute=False).model.padded_vocab_size
    assert rows is not None and rows // 2 < layouts.VOCAB_SIZE < rows
