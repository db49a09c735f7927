"""The selective scan of Mamba-1: every kernel against the recurrence in float64."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.selective_scan import selective_scan, torch_chunked
from megatron_hybrid.ops.selective_scan.mamba_ssm import ENDLESS
from megatron_hybrid.ops.selective_scan.torch_chunked import selective_scan_step
from tests.ops.recurrences import BATCH, check, documents, results

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def make_case(length: int, channels: int, state: int, scale: float = 1.0) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt_bias in float64, x and z as Megatron hands them over.

    Args:
        scale: of dt: 30 gives steps after which nothing is left of a state.
    """
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        normal(length, BATCH, channels).transpose(0, 1),
        scale * normal(BATCH, length, channels),
        -16 * torch.rand(channels, state, generator=generator, dtype=torch.float64),
        normal(BATCH, length, state), normal(BATCH, length, state), normal(channels),
        normal(length, BATCH, channels).transpose(0, 1), normal(channels) - 2,
    ]  # fmt: skip


def run(case: list[Tensor], backend: str, *state: Tensor | None, **named: Any) -> dict[str, Tensor]:
    """The output, the last state and every gradient, in float64."""
    return results(selective_scan, NAMES, case, *state, backend=backend, **named)


CASES = pytest.mark.parametrize(
    ("length", "channels", "state", "packed", "scale"),
    [
        (1, 1, 1, False, 1.0),
        (3, 5, 16, True, 1.0),
        (32, 7, 3, False, 1.0),
        (33, 24, 16, True, 30.0),
        (63, 12, 1, True, 1.0),
        (101, 9, 64, False, 30.0),
        (130, 40, 16, True, 1.0),
    ],
)


@CASES
@pytest.mark.parametrize("begun", [False, True])
def test_blocks_equal_the_recurrence(
    length: int, channels: int, state: int, packed: bool, scale: float, begun: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Output, states and all gradients: float64 to rounding, float32 to 1e-5; also where channels
    and rows are cut into several parts."""
    case = make_case(length, channels, state, scale)
    named = {"seq_idx": documents(length) if packed else None}
    first = torch.randn(BATCH, channels, state, dtype=torch.float64) if begun else None
    want = run(case, "reference", first, **named)
    for part in (7 * state, 10**6):
        monkeypatch.setattr(torch_chunked, "STATES_A_TOKEN", part)
        check(run(case, "torch", first, **named), want, 1e-12)
    single = [each.float() for each in case]
    of_single = run(single, "torch", None if first is None else first.float(), **named)
    check(of_single, want, 1e-5)


def test_bfloat16_is_computed_in_float32() -> None:
    """As near to float64 of the same inputs as rounding the results allows."""
    case = [
        each.bfloat16() if name not in ("A", "D", "dt_bias") else each.float()
        for name, each in zip(NAMES, make_case(101, 24, 16), strict=True)
    ]
    want = run([each.double() for each in case], "reference", seq_idx=documents(101))
    check(run(case, "torch", seq_idx=documents(101)), want, 4e-3)


def test_poisoned_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing uninitialised is read: workspaces and results begin as NaN."""
    # The fixture of the other operations would import torch's compiler, which takes seconds.
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **named: new_empty(*args, **named).fill_(torch.nan)
    )
    monkeypatch.setattr(torch, "empty_like", lambda tensor: empty_like(tensor).fill_(torch.nan))
    case, named = make_case(70, 9, 16), {"seq_idx": documents(70)}
    check(run(case, "torch", **named), run(case, "reference", **named), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_in_parts_and_token_by_token_equals_the_whole(dtype: torch.dtype) -> None:
    """A text in two parts and then token by token, each from the state that the last one left."""
    case = [each.to(dtype) for each in make_case(50, 9, 16)]
    want, want_state = selective_scan(*case)
    x, dt, A, B, C, D, z, bias = case
    outputs, state = [], None
    for part in (slice(0, 13), slice(13, 40)):
        parts = [x[:, part], dt[:, part], A, B[:, part], C[:, part], D, z[:, part], bias]
        y, state = selective_scan(*parts, initial_state=state)
        outputs.append(y)
    assert state is not None
    state = state.transpose(1, 2).contiguous()
    for t in range(40, 50):
        token = [x[:, t], dt[:, t], A.t(), B[:, t], C[:, t], D, z[:, t], bias]
        outputs.append(selective_scan_step(state, *token)[:, None])
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    state = state.transpose(1, 2)
    for got, whole in ((torch.cat(outputs, 1), want), (state, want_state)):
        assert (got - whole).norm() <= limit * whole.norm()


def _kernel_of_mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    delta_bias: Tensor, delta_softplus: bool, return_last_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """mamba-ssm's `selective_scan_ref`: what `selective_scan_fn` is held against there."""
    assert delta_softplus
    assert return_last_state
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert all(each.is_contiguous() for each in (u, delta, B, C, z))
    delta = torch.nn.functional.softplus(delta.double() + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A.double()))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B.double(), u.double())
    state, ys = decay.new_zeros(*u.shape[:2], A.shape[1]), []
    for i in range(u.shape[2]):
        state = decay[:, :, i] * state + inputs[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, i].double()))
    y = torch.stack(ys, dim=2) + u * D[:, None]
    return (y * torch.nn.functional.silu(z)).to(u.dtype), state.float()


@pytest.mark.parametrize("packed", [False, True])
def test_adapter_of_mamba_ssm(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel knows no documents, and gets a token between two of them: same results, and same
    gradients, as with documents; the state after rows of unlike numbers of documents too."""
    module = ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = _kernel_of_mamba_ssm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    case = [each.float() for each in make_case(60, 9, 16)]
    seq_idx = documents(60) if packed else None
    if seq_idx is not None:
        counts = [len(row.unique()) for row in seq_idx]
        assert counts[0] != counts[1]
    want = run([each.double() for each in case], "reference", seq_idx=seq_idx)
    check(run(case, "mamba_ssm", seq_idx=seq_idx), want, 1e-5)
    assert torch.tensor(ENDLESS).bfloat16().double() == ENDLESS
    with pytest.raises(UserError, match="takes no initial_state"):
        selective_scan(*case, initial_state=torch.zeros(BATCH, 9, 16), backend="mamba_ssm")


def test_wrong_shapes_are_all_named() -> None:
    """Each tensor that does not fit is named with its shape and the one it must have."""
    case = make_case(5, 4, 3)
    case[1], case[3] = case[1][..., 1:], case[3][:, 1:]
    with pytest.raises(UserError, match=r"dt has shape \(2, 5, 3\).*B has shape \(2, 4, 3\)"):
        selective_scan(*case)
    with pytest.raises(UserError, match="backend='cuda' is unknown"):
        selective_scan(*case, backend="cuda")  # type: ignore[arg-type]
