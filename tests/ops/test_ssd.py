"""SSD: the chunked implementation against the recurrence over tokens in float64."""

import importlib.util
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.ssd import ssd

NAMES = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dD", "dinitial")
HEADS, HEAD_DIM, STATE, BATCH = 8, 4, 6, 2
needs_mamba_ssm = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba-ssm",
)


class Case(NamedTuple):
    """Inputs of `ssd` in float64, and gradients of its two outputs."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    initial: Tensor
    grad_y: Tensor
    grad_final: Tensor


def make_case(
    length: int, groups: int, seed: int = 0, dt_range: tuple[float, float] = (1e-4, 10.0)
) -> Case:
    """Normal tensors, step sizes log-uniform in `dt_range`, decay rates in [-4, 0]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    low, high = torch.tensor(dt_range, dtype=torch.float64).log()
    return Case(
        x=normal(BATCH, length, HEADS, HEAD_DIM),
        dt=torch.exp(low + (high - low) * uniform(BATCH, length, HEADS)),
        A=-4 * uniform(HEADS),
        B=normal(BATCH, length, groups, STATE),
        C=normal(BATCH, length, groups, STATE),
        D=normal(HEADS),
        initial=normal(BATCH, HEADS, HEAD_DIM, STATE),
        grad_y=normal(BATCH, length, HEADS, HEAD_DIM),
        grad_final=normal(BATCH, HEADS, HEAD_DIM, STATE),
    )


def run(
    case: Case,
    backend: str,
    dtype: torch.dtype = torch.float64,
    seq_idx: Tensor | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs and every gradient, in float64. x, B and C are given in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = (dtype, wide, wide, dtype, dtype, wide, wide)
    inputs = [t.to(device, d).requires_grad_() for t, d in zip(case[:7], dtypes, strict=True)]
    outputs = ssd(
        *inputs[:5],
        D=inputs[5],
        initial_states=inputs[6],
        seq_idx=None if seq_idx is None else seq_idx.to(device),
        return_final_states=True,
        backend=backend,
    )
    grads = [g.to(o) for g, o in zip(case[7:], outputs, strict=True)]
    results = (*outputs, *torch.autograd.grad(outputs, inputs, grads))
    return {name: t.double().cpu() for name, t in zip(NAMES, results, strict=True)}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    """Each relative error, in the Euclidean norm, is within `default` or its name's tolerance."""
    for name in NAMES:
        assert torch.isfinite(got[name]).all(), f"{name} is not finite"
        error = (got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-30)
        limit = tolerance.get(name, tolerance["default"])
        assert error <= limit, f"{name}: relative error {error:.1e} > {limit:.0e}"


def labels(*lengths: int) -> Tensor:
    """seq_idx [BATCH, l] of documents of these lengths; the second row in reverse order."""
    rows = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(order))
        for order in (lengths, lengths[::-1])
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 63, 500, 2048])
def test_chunks_equal_recurrence(length: int, groups: int) -> None:
    """Outputs, final states and all seven gradients, in float64 and in float32."""
    case = make_case(length, groups)
    want = run(case, "reference")
    assert_close(run(case, "torch"), want, default=1e-12)
    assert_close(run(case, "torch", torch.float32), want, default=1e-6)


def test_float32_is_accurate_at_trained_step_sizes() -> None:
    """With steps as in trained models, over which states carry far."""
    case = make_case(2048, 2, dt_range=(1e-3, 0.1))
    assert_close(run(case, "torch", torch.float32), run(case, "reference"), default=1e-6)


@pytest.mark.parametrize("groups", [1, 8])
def test_bfloat16_is_as_good_as_its_inputs(groups: int, bf16_products: str) -> None:
    """bf16 operands cost no more than a few roundings (2^-9), in dt and A too."""
    case = make_case(500, groups)
    rounded = case._replace(**{n: getattr(case, n).bfloat16().double() for n in "xBC"})
    want = run(rounded, "reference")
    assert_close(run(rounded, "torch", torch.bfloat16), want, default=6e-3, dA=1e-2)


def test_bfloat16_keeps_its_states_in_bfloat16(bf16_products: str) -> None:
    """For the backward pass the states take the inputs' memory a number, not that of float32."""
    case = make_case(500, 2)
    x = case.x.bfloat16().requires_grad_()
    y = ssd(x, *case[1:3], *(t.bfloat16() for t in case[3:5]))
    assert isinstance(y, Tensor)
    states = [t for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 5]
    assert [t.dtype for t in states] == [torch.bfloat16]


@pytest.mark.parametrize(
    "lengths",
    [
        (1, 1, 1, 1),
        (64, 64),
        (63, 1, 65, 3),
        (127, 2, 127),
        (1, 62, 1, 1, 62, 1, 200),
        (5, 7, 11, 13, 17, 19, 23, 29, 31, 37),
        (300, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_documents_equal_recurrence(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Boundaries inside chunks, at their edges, and documents of one token."""
    seq_idx = labels(*lengths)
    case = make_case(seq_idx.shape[1], 2)
    want = run(case, "reference", seq_idx=seq_idx)
    got = run(case, "torch", dtype, seq_idx)
    assert_close(got, want, default=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_documents_equal_documents_alone(backend: str) -> None:
    """Packed documents give what each gives on its own; labels may come back in a row."""
    lengths = (70, 1, 130, 2)
    seq_idx = torch.repeat_interleave(torch.tensor([7, 3, 7, 3]), torch.tensor(lengths))
    case = make_case(sum(lengths), 2)
    inputs = (case.x, case.dt, case.B, case.C)
    x, dt, B, C = inputs
    packed, final = ssd(
        x, dt, case.A, B, C, D=case.D, initial_states=case.initial,
        seq_idx=seq_idx.expand(BATCH, -1), return_final_states=True, backend=backend,
    )  # fmt: skip
    alone = []
    for number, parts in enumerate(zip(*(t.split(lengths, dim=1) for t in inputs), strict=True)):
        x, dt, B, C = parts
        initial = case.initial if number == 0 else None
        y, last = ssd(
            x, dt, case.A, B, C, D=case.D, initial_states=initial,
            return_final_states=True, backend=backend,
        )  # fmt: skip
        alone.append(y)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-11)
    torch.testing.assert_close(final, last, rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_any_packing_equals_recurrence(lengths: list[int], groups: int, seed: int) -> None:
    """Random documents, groups and inputs in float64."""
    seq_idx = labels(*lengths)
    case = make_case(seq_idx.shape[1], groups, seed)
    want = run(case, "reference", seq_idx=seq_idx)
    assert_close(run(case, "torch", seq_idx=seq_idx), want, default=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0.0, 1e-30, 1e-4, 10.0, 1e6], ids=str)
def test_extreme_steps_give_finite_gradients(
    poisoned_memory: None, bf16_products: str, dtype: torch.dtype, step: float
) -> None:
    """No NaN or infinity anywhere, from memory that starts as NaN, packed and with a short end."""
    case = make_case(200, 2)
    case = case._replace(dt=torch.full_like(case.dt, step))
    seq_idx = labels(64, 1, 99, 36)
    for name, tensor in run(case, "torch", dtype, seq_idx).items():
        assert torch.isfinite(tensor).all(), name


def test_mixed_steps_in_poisoned_memory_equal_recurrence(poisoned_memory: None) -> None:
    """Nothing uninitialised is ever read: NaN in fresh memory changes no result."""
    case, seq_idx = make_case(333, 2), labels(100, 33, 200)
    want = run(case, "reference", seq_idx=seq_idx)
    assert_close(run(case, "torch", seq_idx=seq_idx), want, default=1e-12)


def test_workspaces_carry_nothing_over(bf16_products: str) -> None:
    """A call gives the same bits whatever shapes and dtypes used the workspaces before it."""
    case = make_case(150, 2)
    first = run(case, "torch", torch.float32)
    run(make_case(700, 8), "torch", torch.bfloat16)
    run(make_case(3, 1), "torch", torch.float64)
    again = run(case, "torch", torch.float32)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_optional_arguments() -> None:
    """Without D, initial states and final states, both implementations still agree."""
    case = make_case(100, 2)
    y, want = (ssd(*case[:5], backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(y, want, rtol=0, atol=1e-11)


def test_wrong_shapes_are_all_named() -> None:
    """Every tensor that does not fit is in one message, with its shape and the wanted one."""
    case = make_case(10, 2)
    with pytest.raises(UserError, match=r"A has shape \(7,\).*must be \(8,\).*B has 3 groups"):
        ssd(case.x, case.dt, case.A[:-1], *(t[:, :, :1].expand(-1, -1, 3, -1) for t in case[3:5]))


def test_unknown_backend_is_named() -> None:
    """The message has the value and what is allowed."""
    with pytest.raises(UserError, match=r"'triton'.*reference, torch, mamba_ssm"):
        ssd(*make_case(2, 1)[:5], backend="triton")


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="it is installed")
def test_missing_mamba_ssm_is_a_user_error() -> None:
    """Asking for an absent package says what to install instead of falling back."""
    with pytest.raises(UserError, match=r"mamba-ssm.*megatron-hybrid\[gpu\].*backend='torch'"):
        ssd(*make_case(2, 1)[:5], backend="mamba_ssm")


@pytest.mark.gpu
@needs_mamba_ssm
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_ssm_equals_recurrence(packed: bool) -> None:
    """The Triton kernels behind our signature compute what the recurrence does."""
    seq_idx = labels(100, 1, 155) if packed else None
    case = make_case(256, 2, dt_range=(1e-3, 0.1))
    want = run(case, "reference", seq_idx=seq_idx)
    got = run(case, "mamba_ssm", torch.float32, seq_idx, device="cuda")
    # Triton's float32 products run on TF32 units.
    assert_close(got, want, default=5e-3)
