"""The Mamba-2 core: the fused function against the composition of plain operations."""

import importlib.util
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hybrid.errors import UserError
from megatron_hybrid.ops.mamba2 import mamba2_split_conv1d_scan
from megatron_hybrid.ops.mamba2_fused import Norm
from megatron_hybrid.ops.mamba2_states import (
    CoreParameters,
    Mamba2Step,
    empty_states,
    mamba2_chunk,
)
from megatron_hybrid.ops.mamba2_summary import mamba2_chunk_summary
from megatron_hybrid.ops.mamba2_texts import Texts, mamba2_texts
from megatron_hybrid.ops.ssd.buffers import Sizes

NAMES = ("y", "dzxbcdt", "dconv1d_weight", "dconv1d_bias", "ddt_bias", "dA", "dD", "dnorm_weight")
HEADS, HEAD_DIM, STATE, TAPS, BATCH = 8, 4, 6, 4, 2
CHANNELS = HEADS * HEAD_DIM
needs_mamba_ssm = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and mamba-ssm",
)


class Case(NamedTuple):
    """Inputs of the core in float64: zxbcdt, its parameters, the norm's weight; a gradient of y."""

    zxbcdt: Tensor
    conv1d_weight: Tensor
    conv1d_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor
    grad_y: Tensor


def make_case(length: int, groups: int) -> Case:
    """Normal tensors; zxbcdt is a transposed view of [l, b, width], as Megatron hands it over."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    convolved = CHANNELS + 2 * groups * STATE
    return Case(
        zxbcdt=normal(length, BATCH, CHANNELS + convolved + HEADS).transpose(0, 1),
        conv1d_weight=normal(convolved, TAPS) / 2,
        conv1d_bias=normal(convolved),
        dt_bias=3 * normal(HEADS) - 2,
        A=-16 * torch.rand(HEADS, generator=generator, dtype=torch.float64),
        D=normal(HEADS),
        norm_weight=normal(CHANNELS),
        grad_y=normal(BATCH, length, CHANNELS),
    )


def keywords(case: Case, groups: int, norm: bool = True) -> dict[str, Any]:
    """The keyword arguments about sizes and the norm."""
    of_norm = {"norm_weight": case.norm_weight, "norm_group_size": CHANNELS // groups}
    return {"head_dim": HEAD_DIM, "num_groups": groups, **(of_norm if norm else {})}


def cast(case: Case, dtype: torch.dtype, device: str = "cpu") -> Case:
    """zxbcdt in `dtype`, parameters in float32 (float64 for float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    zxbcdt = case.zxbcdt.to(device, dtype)
    return Case(zxbcdt, *(t.to(device, wide) for t in case[1:7]), case.grad_y.to(device, dtype))


def run(
    case: Case,
    groups: int,
    backend: str = "torch",
    seq_idx: Tensor | None = None,
    norm: bool = True,
) -> dict[str, Tensor]:
    """The output and every gradient, in float64."""
    inputs = [t.detach().requires_grad_() for t in case[: 7 if norm else 6]]
    with_grad = Case(*inputs, *case[len(inputs) :])
    y = mamba2_split_conv1d_scan(
        *inputs[:6], **keywords(with_grad, groups, norm), seq_idx=seq_idx, backend=backend
    )
    assert y.dtype == case.zxbcdt.dtype
    results = (y, *torch.autograd.grad(y, inputs, case.grad_y))
    return {name: t.double().cpu() for name, t in zip(NAMES, results, strict=False)}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors in the Euclidean norm; a result that is not finite counts as infinite."""
    assert got.keys() == want.keys()
    return {
        name: ((got[name] - t).norm() / t.norm().clamp_min(1e-30)).nan_to_num(torch.inf).item()
        for name, t in want.items()
    }


def documents(length: int) -> Tensor:
    """seq_idx [BATCH, length] with documents of one and of many tokens, in each row others."""
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(BATCH, length, generator=generator) < 0.05).int().cumsum(1)


CASES = pytest.mark.parametrize(
    ("length", "groups", "packed", "norm"),
    [
        (1, 1, False, True),
        (3, 1, True, False),
        (64, 2, False, False),
        (130, 2, True, True),
        (500, 8, True, True),
        (1100, 1, False, True),
    ],
)


@CASES
def test_fused_equals_composition(length: int, groups: int, packed: bool, norm: bool) -> None:
    """Output and all gradients: float64 to rounding, float32 to 2e-5, or to three times what the
    composition's own float32 makes of them, where a norm of few channels amplifies it.
    """
    case = make_case(length, groups)
    seq_idx = documents(length) if packed else None
    want = run(case, groups, "reference", seq_idx, norm)
    for name, error in errors(run(case, groups, "torch", seq_idx, norm), want).items():
        assert error < 1e-12, f"float64 {name}: {error:.1e}"
    case = cast(case, torch.float32)
    composed = errors(run(case, groups, "reference", seq_idx, norm), want)
    for name, error in errors(run(case, groups, "torch", seq_idx, norm), want).items():
        assert error < max(2e-5, 3 * composed[name]), f"float32 {name}: {error:.1e}"


@CASES
def test_fused_in_bfloat16(
    length: int, groups: int, packed: bool, norm: bool, bf16_products: str
) -> None:
    """Against float64 of the same inputs: at most twice the composition's bf16 error, plus 4e-3."""
    case = cast(make_case(length, groups), torch.bfloat16)
    seq_idx = documents(length) if packed else None
    exact = Case(*(t.double() for t in case))
    want = run(exact, groups, "reference", seq_idx, norm)
    limits = errors(run(case, groups, "reference", seq_idx, norm), want)
    for name, error in errors(run(case, groups, "torch", seq_idx, norm), want).items():
        assert error <= 2 * limits[name] + 4e-3, f"{name}: {error:.1e}, {limits[name]:.1e}"


@pytest.mark.parametrize(
    "lengths",
    [(128, 200), (127, 1, 200), (129, 199), (126, 3, 199), (256, 1, 71), (320, 8)],
    ids=str,
)
def test_documents_at_the_edges_of_blocks(lengths: tuple[int, ...]) -> None:
    """Blocks are of 128 tokens here: a document that starts with one, or within its taps of one."""
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seq_idx, case = seq_idx.expand(BATCH, -1), make_case(328, 2)
    want = run(case, 2, "reference", seq_idx)
    for name, error in errors(run(case, 2, "torch", seq_idx), want).items():
        assert error < 1e-12, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_poisoned_memory_changes_nothing(
    poisoned_memory: None, bf16_products: str, dtype: torch.dtype
) -> None:
    """Nothing uninitialised is read: the result is finite and near the composition's."""
    case, seq_idx = cast(make_case(200, 2), dtype), documents(200)
    got = run(case, 2, "torch", seq_idx)
    for name, error in errors(got, run(case, 2, "reference", seq_idx)).items():
        assert error < (1e-12 if dtype == torch.float64 else 5e-2), f"{name}: {error:.1e}"


def test_strided_input_equals_contiguous() -> None:
    """A transposed view gives the same bits as its copy, and y has the input's memory layout."""
    case = cast(make_case(150, 2), torch.float32)
    copied = case._replace(zxbcdt=case.zxbcdt.contiguous())
    strided, contiguous = run(case, 2), run(copied, 2)
    assert all(torch.equal(strided[name], contiguous[name]) for name in NAMES)
    for layout in (case, copied):
        y = mamba2_split_conv1d_scan(*layout[:6], **keywords(layout, 2))
        assert y.transpose(0, 1).is_contiguous() == (layout is case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_bits(
    reentrant: bool, dtype: torch.dtype, bf16_products: str
) -> None:
    """Under activation checkpointing: first without gradients, then again with them."""
    case = cast(make_case(150, 2), dtype)
    want = run(case, 2)
    inputs = [t.detach().requires_grad_() for t in case[:6]]
    y = checkpoint(
        lambda *args: mamba2_split_conv1d_scan(*args, **keywords(case, 2)),
        *inputs,
        use_reentrant=reentrant,
    )
    y.backward(case.grad_y)
    assert torch.equal(y.double(), want["y"])
    for tensor, name in zip(inputs, NAMES[1:7], strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad.double(), want[name])


def test_gradients_of_some_inputs_only() -> None:
    """Frozen parameters take no gradient, and a frozen input does not stop the others'."""
    case = cast(make_case(150, 2), torch.float32)
    want = run(case, 2)
    A = case.A.clone().requires_grad_()
    y = mamba2_split_conv1d_scan(*case[:4], A, case.D, **keywords(case, 2))
    y.backward(case.grad_y)
    assert A.grad is not None
    assert torch.equal(A.grad.double(), want["dA"])
    with torch.no_grad():
        y = mamba2_split_conv1d_scan(*case[:4], A, case.D, **keywords(case, 2))
    assert not y.requires_grad
    assert torch.equal(y.double(), want["y"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [[1], [2, 64], [64, 1, 3], [75]], ids=str)
def test_with_states_equals_the_full_forward(dtype: torch.dtype, parts: list[int]) -> None:
    """A text in parts and then token by token gives what the whole gives at once; its states are
    those of a text that was given whole, and stay where they are."""
    case, length = cast(make_case(80, 2), dtype), 80
    full = mamba2_split_conv1d_scan(*case[:6], **keywords(case, 2))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = Sizes(HEADS, HEAD_DIM, 2, STATE)
    weights = (each.to(compute) for each in case[1:7])
    conv, bias, dt_bias, A, D, norm_weight = weights
    parameters = CoreParameters(
        sizes, conv.t().contiguous(), bias, dt_bias, A[:, None], D[:, None], norm_weight,
        Norm(keywords(case, 2)["norm_group_size"], 1e-5),
    )  # fmt: skip
    states = empty_states(parameters, BATCH, compute)
    outputs, first = [], 0
    for part in parts:
        chunk = case.zxbcdt[:, first : first + part]
        outputs.append(mamba2_chunk(chunk, parameters, *states))
        first += part
    step = Mamba2Step(sizes, *states)
    with torch.no_grad():
        for t in range(first, length):
            outputs.append(step(case.zxbcdt[:, t], parameters)[:, None].clone())
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    stepped = torch.cat(outputs, dim=1)
    assert (stepped - full).double().norm() <= limit * full.double().norm()
    whole = empty_states(parameters, BATCH, compute)
    mamba2_chunk(case.zxbcdt, parameters, *whole)
    assert torch.equal(states[0], whole[0])
    assert (states[1] - whole[1]).norm() <= limit * whole[1].norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_texts_at_once_equal_each_alone(dtype: torch.dtype) -> None:
    """Texts of any lengths, some after a part of theirs, have the outputs and states of each."""
    lengths = [1, 2, 2, 3, 64, 64, 65, 70, 130, 130]
    case = cast(make_case(sum(lengths), 2), dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    conv, bias, dt_bias, A, D, norm_weight = (each.to(compute) for each in case[1:7])
    parameters = CoreParameters(
        Sizes(HEADS, HEAD_DIM, 2, STATE), conv.t().contiguous(), bias, dt_bias, A[:, None],
        D[:, None], norm_weight, Norm(keywords(case, 2)["norm_group_size"], 1e-5),
    )  # fmt: skip
    draws = torch.Generator().manual_seed(5)
    states = [
        torch.randn(each.shape, generator=draws, dtype=compute)
        for each in empty_states(parameters, len(lengths), compute)
    ]
    alone, tokens = [each.clone() for each in states], case.zxbcdt[0]
    want = [
        mamba2_chunk(part[None], parameters, alone[0][i : i + 1], [alone[1][i]])[0]
        for i, part in enumerate(tokens.split(lengths))
    ]
    out = torch.full((len(tokens), HEADS * HEAD_DIM), torch.nan, dtype=dtype)
    mamba2_texts(tokens, parameters, Texts(lengths, tokens.device), *states, out)
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    for got, expected in zip(out.split(lengths), want, strict=True):
        assert (got - expected).double().norm() <= limit * expected.double().norm()
    assert torch.equal(states[0], alone[0])
    for ours, each in zip(states[1], alone[1], strict=True):
        assert (ours - each).norm() <= limit * each.norm()


def test_wrong_sizes_are_all_named() -> None:
    """The width, the groups and the norm's groups are checked before any work."""
    case = make_case(5, 2)
    with pytest.raises(UserError, match=r"num_groups=3 must divide the 8 heads.*width 95.*be 96"):
        mamba2_split_conv1d_scan(case.zxbcdt[..., 1:], *case[1:6], head_dim=4, num_groups=3)
    with pytest.raises(UserError, match="norm_group_size=5 must divide the 32 channels"):
        mamba2_split_conv1d_scan(*case[:6], **{**keywords(case, 2), "norm_group_size": 5})


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="it is installed")
def test_missing_mamba_ssm_is_a_user_error() -> None:
    """Asking for an absent package says what to install instead of falling back."""
    case = make_case(5, 2)
    with pytest.raises(UserError, match=r"mamba-ssm.*megatron-hybrid\[gpu\]"):
        mamba2_split_conv1d_scan(*case[:6], **keywords(case, 2), backend="mamba_ssm")


@pytest.mark.gpu
@needs_mamba_ssm
@pytest.mark.parametrize("packed", [False, True])
def test_mamba_ssm_equals_composition(packed: bool) -> None:
    """The Triton kernels behind our signature compute what the composition does."""
    case = make_case(256, 2)
    seq_idx = documents(256) if packed else None
    want = run(case, 2, "reference", seq_idx)
    seq_idx = None if seq_idx is None else seq_idx.cuda()
    got = run(cast(case, torch.float32, "cuda"), 2, "mamba_ssm", seq_idx)
    for name, error in errors(got, want).items():
        assert error < 2e-2, f"{name}: {error:.1e}"


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("cut", [3, 64, 101])
def test_a_chunk_goes_on_where_the_one_before_ends(
    cut: int, backend: Any, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the summary of that one, which comes in stretches: outputs and all gradients are those of
    the whole, in float64."""
    monkeypatch.setattr("megatron_hybrid.ops.mamba2_summary.STRETCH", 16)
    case = make_case(120, 2)
    inputs = [each.requires_grad_() for each in case[:7]]
    documents = torch.zeros(BATCH, 120, dtype=torch.int64)
    if packed:
        documents = (
            torch.rand(BATCH, 120, generator=torch.Generator().manual_seed(1)) < 0.1
        ).cumsum(1)
    sizes: dict[str, Any] = {"head_dim": HEAD_DIM, "num_groups": 2}
    norm = {"norm_weight": case.norm_weight, "norm_group_size": 8, **sizes}
    whole = mamba2_split_conv1d_scan(*inputs[:6], seq_idx=documents, backend="reference", **norm)
    first, second = case.zxbcdt[:, :cut], case.zxbcdt[:, cut:]
    of_first, of_second = documents[:, :cut], documents[:, cut:]
    joined = documents[:, cut - TAPS + 1 : cut] == documents[:, cut : cut + 1]
    before = first[:, 1 - TAPS :, CHANNELS:-HEADS]
    nothing = torch.zeros_like(before)
    decay, added = mamba2_chunk_summary(
        first, *inputs[1:5], before=nothing, seq_idx=of_first, **sizes
    )
    assert (decay[of_first[:, 0] != of_first[:, -1]] == 0).all()
    parts = [
        mamba2_split_conv1d_scan(first, *inputs[1:6], seq_idx=of_first, backend=backend, **norm),
        mamba2_split_conv1d_scan(
            second, *inputs[1:6], seq_idx=of_second, before=before * joined[..., None],
            initial_states=added * joined[:, -1, None, None, None], backend=backend, **norm,
        ),
    ]  # fmt: skip
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-11)
    gradients = torch.autograd.grad(found, inputs, case.grad_y)
    for name, got, want in zip(
        NAMES[1:], gradients, torch.autograd.grad(whole, inputs, case.grad_y), strict=True
    ):
        error = (got - want).norm() / want.norm()
        assert error < 1e-11, f"{name}: {error:.1e}"
