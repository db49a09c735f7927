"""A student learns from a teacher of another width in every layout as on one rank, whatever the
teacher's own layout is; from itself it learns nothing."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.config import RunConfig, build_config
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    LAYOUTS,
    MOE,
    ONE_RANK,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Layout,
    batches_of_this_rank,
    built,
    gradient_parts,
    layout_config,
    merge_gradients,
    save_weights,
)

BATCH = 6  # which a teacher of four replicas cannot divide
RELATIVE_TOLERANCE = 1e-5
# Half as wide as the student, with other layers of each kind, and experts.
TEACHER = {
    "hybrid_layer_pattern": "M*E-", "hidden_size": 32, "ffn_hidden_size": 64,
    "num_attention_heads": 4, "num_query_groups": 2, "position_embedding_type": "rope",
    "mamba_head_dim": 16, "mamba_state_dim": 8, "mamba_num_groups": 4, "vocab_size": VOCAB_SIZE,
    "make_vocab_size_divisible_by": 16, "lm_head_multiplier": 2.0, "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16, "moe_router_topk": 2,
}  # fmt: skip
MIXED = {"kl_type": "mixed", "mixed_kl_weight": 0.7, "temperature": 1.5, "lm_loss_weight": 0.25}
# Of a layer within a stage and of one that ends the last one; half of the teacher's layers.
HIDDEN = {
    "hidden_states": [
        {"student": 1, "teacher": 2, "weight": 0.7}, {"student": 4, "teacher": 4, "weight": 2.0},
    ],
}  # fmt: skip
HIDDEN_MSE = HIDDEN | {"hidden_states_loss": "mse", "kl_weight": 0.5}
Step = tuple[float, float, dict[str, float], dict[str, Any]]

BY_NAME = {layout.name: layout for layout in LAYOUTS}
# A student's layout, and its teacher's where that is another one.
CASES: list[tuple[str, dict[str, int]]] = [
    *((name, {}) for name in ("TP2+SP", "PP2xVPP2", "CP2", "EP2", "TP2xPP2")),
    ("DP2", {"tensor": 2}),
    ("TP2+SP", {"pipeline": 2, "tensor": 1}),
    ("PP2xVPP2", {"context": 2, "pipeline": 1, "twice": 1}),
    ("TP2xCP2", {"tensor": 1, "context": 1, "expert": 2}),
    ("TP2xPP2", {"tensor": 2, "context": 2, "pipeline": 1}),
]


def taught(config: RunConfig, teacher: Path, options: dict[str, Any]) -> RunConfig:
    """A config whose model learns from a teacher."""
    values = config.model_dump(mode="json")
    values["training"] |= {
        "objective": "distillation", "objective_options": {"teacher": str(teacher)} | options,
    }  # fmt: skip
    return build_config(values)


def save_teachers(width: Path, same: Path, student: Path) -> None:
    """On a rank: a teacher of another width, and one that is the student, as runs save them."""
    from megatron_hybrid.checkpoint.integrity import write_integrity
    from megatron_hybrid.config.tracker import CONFIG_FILE
    from megatron_hybrid.data.tokenizer import build_tokenizer
    from tests.distributed import layouts

    config = layout_config(ONE_RANK, MOE, packed=False, recompute=False)
    other = build_config(config.model_dump(mode="json") | {"model": TEACHER})
    save_weights(MOE, student)
    save_weights(MOE, same)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "layout_config", lambda *_, **__: other)
        save_weights(MOE, width)
    for folder, its in ((width, other), (same, config)):
        (folder / CONFIG_FILE).write_text(its.to_yaml())
        build_tokenizer("null", None, vocab_size=VOCAB_SIZE).save_copy(folder)
        write_integrity(folder, threads=1)


def steps(
    layout: Layout, student: Path, teacher: Path, variants: list[tuple[bool, dict[str, Any]]]
) -> list[Step]:
    """On a rank: a step of each variant (packed or not, and options)."""
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    found = []
    for packed, options in variants:
        plain = layout_config(layout, MOE, packed=packed, recompute=False, batch=BATCH)
        with built(taught(plain, teacher, options)) as (model, optimizer, stepper):
            load_checkpoint(plain, student, model, optimizer, weights_only=True)
            data = batches_of_this_rank(packed, batch=BATCH)
            shape = BatchShape(BATCH, SEQ_LENGTH)
            result = stepper.train(data, shape, float("inf"), [])
            found.append((result.loss, result.grad_norm, result.reports, gradient_parts(model)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("width", "same", "student")}
    run_distributed(save_teachers, 1, *found.values())
    return found


def parallel(own: dict[str, int], teacher: Path) -> dict[str, Any]:
    """The options of a teacher's layout; of `twice`, the teacher is two, one of them in its own."""
    ending = {"expert": "expert_model_parallel_size", "context": "context_parallel_size"}
    sizes = {
        ending.get(name, f"{name}_model_parallel_size"): size
        for name, size in own.items()
        if name != "twice"
    }
    if "twice" in own:
        half = {"checkpoint": str(teacher), "weight": 0.5}
        return {"teacher": None, "teachers": {"a": half | {"parallel": sizes}, "b": half}}
    return {"teacher_parallel": sizes} if sizes else {}


@cache
def on_one_rank(student: Path, teacher: Path) -> list[Step]:
    variants: list[tuple[bool, dict[str, Any]]] = [
        (False, {}), (True, MIXED), (False, HIDDEN), (True, HIDDEN_MSE),
    ]  # fmt: skip
    (found,) = run_distributed(steps, 1, ONE_RANK, student, teacher, variants)
    return found


@pytest.mark.parametrize(
    ("name", "own"), CASES,
    ids=["-".join([name, *(f"{d}{n}" for d, n in own.items())]) for name, own in CASES],
)  # fmt: skip
def test_equals_one_rank(name: str, own: dict[str, int], folders: dict[str, Path]) -> None:
    """Losses, norms, reports and every gradient, to 1e-5: of whole samples, of documents with a
    mixed divergence, a temperature and the student's own loss, and with terms of hidden states,
    whose projections have gradients, too."""
    layout, options = BY_NAME[name], parallel(own, folders["width"])
    reference = on_one_rank(folders["student"], folders["width"])
    variants = [(False, options), (True, MIXED | options)]
    if not own:  # hidden states of layers are compared where both models are in one layout
        variants += [(False, HIDDEN), (True, HIDDEN_MSE)]
    of_ranks = run_distributed(
        steps, layout.ranks, layout, folders["student"], folders["width"], variants, timeout_s=300
    )
    assert reference[2][2]["hidden_1"] > 0.1 and "objective.hidden_4.weight" in reference[2][3]
    for variant, (loss, norm, reports, gradient) in enumerate(reference[: len(variants)]):
        each = [rank[variant] for rank in of_ranks]
        assert each[0][0] == pytest.approx(loss, rel=RELATIVE_TOLERANCE)
        assert each[0][1] == pytest.approx(norm, rel=RELATIVE_TOLERANCE)
        assert each[0][2] == pytest.approx(reports, rel=RELATIVE_TOLERANCE)
        compare(merge_gradients([rank[3] for rank in each]), merge_gradients([gradient]))


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, reference in expected.items():
        error = (actual[key] - reference).norm() / (reference.norm() or torch.ones(()))
        assert error <= RELATIVE_TOLERANCE, f"{key}: relative error {error:.1e}"


def test_a_teacher_teaches_itself_nothing(folders: dict[str, Path]) -> None:
    """A student that is its teacher: no divergence and no gradient but for rounding, and for the
    balance of experts, which is not the teacher's doing."""
    ((found,),) = run_distributed(
        steps, 1, ONE_RANK, folders["student"], folders["same"], [(False, {})]
    )
    loss, _, reports, gradient = found
    assert 0.0 <= loss == reports["kl"] < 1e-11 and reports["agreement"] == 1.0
    assert reports["lm_loss"] == pytest.approx(reports["teacher_lm_loss"], rel=1e-6)
    assert merge_gradients([gradient])["output_layer.weight"].abs().max() < 1e-7
