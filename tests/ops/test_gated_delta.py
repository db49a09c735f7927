"""The gated delta rule: chunks and steps against the recurrence in float64, and transformers'."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.gated_delta import (
    gated_delta_rule,
    gated_delta_step,
    gated_delta_summary,
    torch_chunked,
)
from tests.ops.recurrences import BATCH, check, documents, results

NAMES = ("q", "k", "v", "g", "beta")


def make_case(
    length: int, key_heads: int, served: int, state: int, channels: int, scale: float = 1.0
) -> list[Tensor]:
    """q, k, v, g, beta in float64.

    Args:
        served: value heads a key head.
        scale: of g: 30 gives decays after which nothing is left of a state.
    """
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = key_heads * served
    keys = (BATCH, length, key_heads, state)
    return [
        normal(*keys), normal(*keys), normal(BATCH, length, heads, channels),
        -scale * normal(BATCH, length, heads).abs(), normal(BATCH, length, heads).sigmoid(),
    ]  # fmt: skip


def run(case: list[Tensor], backend: str, *state: Tensor | None, **named: Any) -> dict[str, Tensor]:
    """The output, the last state and every gradient, in float64."""
    return results(gated_delta_rule, NAMES, case, *state, backend=backend, **named)


@pytest.mark.parametrize(
    ("length", "key_heads", "served", "state", "channels", "packed", "scale"),
    [
        (1, 1, 1, 2, 1, False, 1.0),
        (3, 2, 2, 5, 3, True, 1.0),
        (64, 1, 3, 8, 16, False, 1.0),
        (65, 3, 1, 16, 8, True, 30.0),
        (200, 2, 2, 8, 8, True, 0.1),
        (300, 1, 2, 16, 4, False, 0.01),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_chunks_equal_the_recurrence(
    length: int, key_heads: int, served: int, state: int, channels: int, packed: bool,
    scale: float, begun: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Output, states and all gradients: float64 to rounding, float32 to 1e-5; also where the
    sequence is several stretches."""
    monkeypatch.setattr(torch_chunked, "STRETCH", 2 * torch_chunked.CHUNK)
    case = make_case(length, key_heads, served, state, channels, scale)
    named = {"seq_idx": documents(length) if packed else None}
    heads, first = key_heads * served, None
    if begun:
        first = torch.randn(BATCH, heads, state, channels, dtype=torch.float64)
    want = run(case, "reference", first, **named)
    check(run(case, "torch", first, **named), want, 1e-12)
    single = None if first is None else first.float()
    check(run([each.float() for each in case], "torch", single, **named), want, 1e-5)


def test_a_large_decay_leaves_small_ones_exact() -> None:
    """What follows a decay of e^-3000 is as exact as elsewhere: sums begin behind it."""
    case = make_case(60, 1, 1, 8, 8, 1e-3)
    case[3][:, 10] = -3000.0
    want = run([each.clone() for each in case], "reference")
    check(run([each.float() for each in case], "torch"), want, 1e-5)


def test_bfloat16_is_computed_in_float32() -> None:
    """As near to float64 of the same inputs as rounding the results allows."""
    case = [
        each.float() if name == "g" else each.bfloat16()
        for name, each in zip(NAMES, make_case(101, 2, 2, 16, 8), strict=True)
    ]
    inputs = [each.requires_grad_() for each in case]
    y, _ = gated_delta_rule(*inputs, seq_idx=documents(101))
    grads = torch.autograd.grad(y.double().square().sum(), inputs)
    wide = [each.detach().double().requires_grad_() for each in case]
    exact, _ = gated_delta_rule(*wide, seq_idx=documents(101), backend="reference")
    wanted = torch.autograd.grad(exact.square().sum(), wide)
    for name, got, want in zip(("y", *NAMES), (y, *grads), (exact, *wanted), strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm(), name


def test_in_parts_and_token_by_token_equals_the_whole() -> None:
    """A text in two parts and then token by token, each from the state that the last one left."""
    case = [each.float() for each in make_case(90, 2, 2, 8, 4)]
    want, want_state = gated_delta_rule(*case)
    outputs, state = [], None
    for part in (slice(0, 13), slice(13, 80)):
        y, state = gated_delta_rule(*(each[:, part] for each in case), initial_state=state)
        outputs.append(y)
    assert state is not None
    state = state.clone()
    for t in range(80, 90):
        outputs.append(gated_delta_step(state, *(each[:, t] for each in case))[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-6)


def test_transformers_computes_the_same() -> None:
    """Qwen3-Next's rule, by its own chunked code, in float32."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    case = [each.float() for each in make_case(150, 2, 2, 16, 8)]
    q, k, v, g, beta = case
    theirs, state = torch_chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    y, last = gated_delta_rule(*case)
    torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-6)


def test_poisoned_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing uninitialised is read."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **named: new_empty(*args, **named).fill_(torch.nan)
    )
    case, named = make_case(70, 1, 2, 4, 4), {"seq_idx": documents(70)}
    check(run(case, "torch", **named), run(case, "reference", **named), 1e-12)


def test_shapes_that_do_not_fit() -> None:
    """All at once, by name; and value heads that key heads do not divide."""
    q, k, v, g, beta = make_case(4, 2, 2, 8, 4)
    with pytest.raises(UserError, match=r"q has shape .*; g has shape"):
        gated_delta_rule(q[:, :3], k, v, g[..., :1], beta)
    with pytest.raises(UserError, match="3 heads of v must be a multiple of the 2 heads of k"):
        gated_delta_rule(q, k, v[:, :, :3], g[..., :3], beta[..., :3])
    with pytest.raises(UserError, match="allowed: reference, torch"):
        gated_delta_rule(q, k, v, g, beta, backend="fla")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-6, 0.1, 30.0])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_the_summary_is_what_happens_to_any_state(scale: float, packed: bool) -> None:
    """A state after the last token is what it says, and so are all gradients; documents end it."""
    case = make_case(70, 2, 3, 5, 4, scale)
    seq_idx = documents(70) if packed else torch.zeros(BATCH, 70)
    state = torch.randn(BATCH, 6, 5, 4, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (*case, state)]
    _, after = gated_delta_rule(*case, seq_idx=seq_idx, initial_state=state, backend="reference")
    transfer, added = gated_delta_summary(*case, seq_idx=seq_idx)
    if packed:
        assert (transfer == 0).all()
    found = transfer @ state + added
    torch.testing.assert_close(found, after, rtol=1e-9, atol=1e-12)
    grad = torch.randn_like(after)
    for got, want in zip(
        torch.autograd.grad(found, inputs[1:], grad),
        torch.autograd.grad(after, inputs[1:], grad), strict=True,
    ):  # fmt: skip
        assert (got - want).norm() <= 1e-9 * want.norm() + 1e-12
