"""Runs in emulated float8: which linears are in it, and that they train, resume and scale out."""

import math
from pathlib import Path

import torch

from megatron_hybrid.model.float8 import float8_linears
from megatron_hybrid.testing import run_distributed
from megatron_hybrid.training.plot_float8 import draw_float8
from tests.training.runs import losses, records, same_tensors, tensors, trainer, words

RECIPES = ("fp8_tensorwise", "fp8_blockwise", "fp8_delayed", "mxfp8")
PATTERN = "M-M*E-M-"
DENSE = [
    "model.hidden_size=32", "model.mamba_num_heads=32", "model.mamba_head_dim=2",
    "model.ffn_hidden_size=128", "model.kv_channels=32",
]  # fmt: skip
MOE = [
    f"model.hybrid_layer_pattern={PATTERN}", "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=64", "model.moe_router_topk=2",
    "model.moe_shared_expert_intermediate_size=64",
]  # fmt: skip


def dense(run_dir: Path, recipe: str, *more: str) -> list[str]:
    emulate = recipe not in ("bf16", "fp32")
    return words(
        run_dir, *DENSE, f"precision.recipe={recipe}", f"precision.emulate={str(emulate).lower()}",
        *more,
    )  # fmt: skip


def line(run_dir: Path, recipe: str, *more: str) -> list[str]:
    return dense(run_dir, recipe, *MOE, *more)


def in_float8(lines: list[list[str]]) -> list[list[str]]:
    """On a rank: the linears in float8 of each run's model."""
    found = []
    for each in lines:
        with trainer(each) as run:
            found.append(list(float8_linears(run.model)))
    return found


def test_which_linears(tmp_path: Path) -> None:
    """All of the inner layers' but the router; the two layers at either end where a recipe says so,
    which are four matrix products; what the config says instead.
    """
    found = run_distributed(
        in_float8,
        1,
        [
            *(line(tmp_path, recipe) for recipe in (*RECIPES, "bf16")),
            line(
                tmp_path, "fp8_tensorwise", "precision.num_layers_at_start_in_bf16=4",
                "precision.num_layers_at_end_in_bf16=1",
            ),
        ],
    )[0]  # fmt: skip
    of_kind = {
        "M": ["mixer.in_proj", "mixer.out_proj"],
        "*": ["self_attention.linear_proj", "self_attention.linear_qkv"],
        "-": ["mlp.linear_fc1", "mlp.linear_fc2"],
        "E": [
            "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2",
            "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2",
        ],
    }  # fmt: skip

    def layers(first: int, last: int) -> list[str]:
        return [f"{n}.{name}" for n in range(first, last + 1) for name in of_kind[PATTERN[n - 1]]]

    inner, whole = layers(3, 6), layers(1, 8)
    assert found == [inner, inner, whole, whole, [], layers(5, 7)]


def trained(lines: list[list[str]]) -> None:
    """On a rank: runs, one after the other."""
    for each in lines:
        with trainer(each) as run:
            run.run()


STEPS, LAST = 40, 8


def ends(recipe: str) -> tuple[str, ...]:
    return ("start", "end") if recipe in ("fp8_tensorwise", "fp8_blockwise") else ()


def test_trains_as_bf16_does(tmp_path: Path) -> None:
    """40 steps from the same weights on the same tokens: the loss falls as far, to 1 %.

    One layer at either end in BF16, where the recipe has any, of five: Mamba-2, attention and MLP
    are in float8 under each recipe.
    """
    runs = {recipe: tmp_path / recipe for recipe in ("bf16", *RECIPES)}
    lines = [
        dense(
            run_dir, recipe, f"training.train_iters={STEPS}", "optimizer.lr=2e-3",
            "optimizer.lr_decay_style=cosine",
            "training.micro_batch_size=4", "logging.float8_interval=null",
            "model.hybrid_layer_pattern=MM*--",
            *(f"precision.num_layers_at_{end}_in_bf16=1" for end in ends(recipe)),
        )
        for recipe, run_dir in runs.items()
    ]  # fmt: skip
    for each in lines:
        run_distributed(trained, 1, [each])
    final = {}
    for recipe, run_dir in runs.items():
        found = losses(run_dir)
        assert len(found) == STEPS
        final[recipe] = sum(found[-LAST:]) / LAST
        assert final[recipe] < 0.9 * found[0]
    gaps = {recipe: loss / final["bf16"] - 1 for recipe, loss in final.items()}
    assert max(map(abs, gaps.values())) < 0.01, gaps
    for recipe in RECIPES:
        assert losses(runs[recipe]) != losses(runs["bf16"])


def test_records(tmp_path: Path) -> None:
    """Every so many steps, how each linear's operands fit; the same with layers computed again, and
    as many numbers as there are.
    """
    plain, again = tmp_path / "plain", tmp_path / "again"
    recompute = [
        "training.recompute_granularity=full", "training.recompute_method=uniform",
        "training.recompute_num_layers=1",
    ]  # fmt: skip
    lines = [
        line(run_dir, "fp8_delayed", "logging.float8_interval=2", *more)
        for run_dir, more in ((plain, []), (again, recompute))
    ]
    run_distributed(trained, 1, lines)
    found = records(plain, "float8")
    assert [record["iteration"] for record in found] == [2, 4]
    last = found[-1]
    assert last["linears"][:2] == ["1.mixer.in_proj", "1.mixer.out_proj"]
    for role in ("input", "weight", "gradient"):
        assert all(value > 0 for value in last[role]["amax"])
        assert all(0 <= value <= 1 for value in last[role]["underflow"] + last[role]["saturated"])
    assert losses(plain) == losses(again)
    assert found == records(again, "float8")
    draw_float8(plain, tmp_path / "float8.png")
    assert (tmp_path / "float8.png").read_bytes().startswith(b"\x89PNG")


def test_delayed_scaling_resumes(tmp_path: Path) -> None:
    """Two steps, a new start and two more are four: the same bits of weights and histories."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lines = [
        line(whole, "fp8_delayed"),
        line(parts, "fp8_delayed", "training.exit_interval=2"),
        line(parts, "fp8_delayed"),
    ]
    run_distributed(trained, 2, lines)
    assert losses(whole) == losses(parts)
    one, other = run_distributed(
        both, 1, [run / "checkpoints" / "iter_0000004" for run in (whole, parts)]
    )[0]
    assert any(key.startswith("float8_history.") and value.any() for key, value in one.items())
    assert same_tensors(one, other)


def both(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    return [tensors(folder) for folder in folders]


def test_a_bf16_run_goes_on_in_float8(tmp_path: Path) -> None:
    """And the other way: what only one of them has is made anew, or left."""
    first, second, third = (tmp_path / name for name in ("bf16", "float8", "back"))

    def taken(run_dir: Path, recipe: str, source: Path, steps: int) -> list[str]:
        return line(
            run_dir, recipe, f"checkpoint.load={source / 'checkpoints'}",
            f"training.train_iters={steps}",
        )  # fmt: skip

    run_distributed(
        trained,
        1,
        [
            line(first, "bf16"),
            taken(second, "fp8_delayed", first, 6),
            taken(third, "bf16", second, 8),
        ],
    )
    assert [record["iteration"] for record in records(third)] == [7, 8]
    assert all(math.isfinite(loss) for loss in losses(second) + losses(third))


def test_layouts(tmp_path: Path) -> None:
    """TP2 with SP, and PP2 with EP2, against one rank: losses of three steps to 1 %.

    One recipe has scales of tiles, the other of whole tensors, agreed on by the ranks. Pipeline and
    expert parallelism give whole tensors to a rank; TP gives it a part, whose tiles are others.
    """
    layouts: dict[str, tuple[int, list[str]]] = {
        "one": (1, []),
        "tp": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
        "pp_ep": (
            4,
            [
                "parallel.pipeline_model_parallel_size=2", "parallel.expert_model_parallel_size=2",
                f"model.hybrid_layer_pattern={PATTERN[2:4]}|{PATTERN[4:6]}",
            ],
        ),
    }  # fmt: skip
    recipes = ("fp8_blockwise", "fp8_delayed")
    all_layers = [
        f"model.hybrid_layer_pattern={PATTERN[2:6]}", "precision.num_layers_at_start_in_bf16=0",
        "precision.num_layers_at_end_in_bf16=0", "training.train_iters=3",
    ]  # fmt: skip
    for name, (ranks, more) in layouts.items():
        lines = [line(tmp_path / name / recipe, recipe, *all_layers, *more) for recipe in recipes]
        run_distributed(trained, ranks, lines)
    for recipe in recipes:
        one, *others = (torch.tensor(losses(tmp_path / name / recipe)) for name in layouts)
        for other in others:
            torch.testing.assert_close(other, one, rtol=0.01, atol=0)
