"""Blocked causal attention against the plain formula in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.ops import attention
from megatron_hybrid.ops.attention import causal_attention, full_attention
from megatron_hybrid.ops.attention_blocks import plan_blocks


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    window: int | None,
    seq_idx: Tensor,
    causal: bool = True,
) -> Tensor:
    """softmax(q k / sqrt d) v with one dense mask; `places` are the queries' in the text."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
    logits = torch.einsum("sbnd,lbnd->bnsl", query, key) / query.shape[-1] ** 0.5
    distance = places[:, None] - torch.arange(key.shape[0])
    mask = (distance >= 0) | (not causal)
    if window is not None:
        mask = mask & (distance < window)
    mask = mask[None] & (seq_idx[:, places, None] == seq_idx[:, None, :])
    weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bnsl,lbnd->sbnd", weights, value).flatten(2)


def documents(batch: int, length: int, mean_length: int) -> Tensor:
    """Random document numbers `[b, l]`, other ones in each row."""
    draws = torch.Generator().manual_seed(length)
    return (torch.rand(batch, length, generator=draws) < 1 / mean_length).cumsum(dim=1)


@pytest.mark.parametrize(("length", "heads"), [(1, 4), (63, 4), (500, 4), (1100, 2)])
@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("mean_document", [None, 3, 60, 700])
def test_equals_formula(
    length: int, heads: int, window: int | None, mean_document: int | None
) -> None:
    """Outputs and gradients of q, k and v, for windows and documents of any length."""
    batch, size = 2, 8
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(length, batch, n, size, dtype=torch.float64, requires_grad=True)
        for n in (heads, heads // 2, heads // 2)
    )
    seq_idx = None if mean_document is None else documents(batch, length, mean_document)
    output = causal_attention(
        query, key, value, chunks=[(0, length)], window=window, seq_idx=seq_idx
    )
    same_document = torch.zeros(batch, length) if seq_idx is None else seq_idx
    expected = naive_attention(query, key, value, torch.arange(length), window, same_document)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(output)
    actual_grads = torch.autograd.grad(output, (query, key, value), upstream)
    expected_grads = torch.autograd.grad(expected, (query, key, value), upstream)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("mean_document", [None, 60])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bf16_is_as_good_as_its_inputs(
    groups: int, mean_document: int | None, window: int | None, bf16_products: str
) -> None:
    """Outputs and gradients cost a few roundings (2^-9) over the formula in float64."""
    batch, length, heads, size = 2, 500, 4, 16
    draws = torch.Generator().manual_seed(groups)
    inputs = [
        torch.randn(length, batch, n, size, generator=draws).bfloat16().requires_grad_()
        for n in (heads, groups, groups)
    ]
    seq_idx = None if mean_document is None else documents(batch, length, mean_document)
    output = causal_attention(*inputs, chunks=[(0, length)], window=window, seq_idx=seq_idx)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    same_document = torch.zeros(batch, length) if seq_idx is None else seq_idx
    expected = naive_attention(*exact, torch.arange(length), window, same_document)
    upstream = torch.randn(output.shape, generator=draws).bfloat16()
    actual = (output, *torch.autograd.grad(output, inputs, upstream))
    wanted = (expected, *torch.autograd.grad(expected, exact, upstream.double()))
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


def test_bf16_through_fp32_keeps_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fp32 tensors of tokens and channels none is kept for the backward pass."""
    monkeypatch.setattr(attention, "through_fp32", lambda tensor: True)
    made: list[StorageWeakRef] = []

    class Fp32(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            results = func(*args, **(kwargs or {}))
            for out in results if isinstance(results, tuple) else (results,):
                if isinstance(out, Tensor) and out.dtype == torch.float32 and out.dim() == 4:
                    made.append(StorageWeakRef(out.untyped_storage()))
            return results

    inputs = [torch.randn(300, 1, n, 8).bfloat16().requires_grad_() for n in (4, 2, 2)]
    with Fp32():
        output = causal_attention(*inputs, chunks=[(0, 300)], window=70)
    assert made and all(ref.expired() for ref in made)
    output.sum().backward()
    assert inputs[0].grad is not None


@pytest.mark.parametrize("packed", [False, True])
def test_parts_of_a_sequence(packed: bool) -> None:
    """Two zigzag chunks of queries get what they get in the whole text."""
    length, chunks = 2400, [(600, 1200), (1800, 2400)]
    torch.manual_seed(0)
    query, key, value = (torch.randn(length, 1, 2, 8, dtype=torch.float64) for _ in range(3))
    seq_idx = documents(1, length, 400) if packed else None
    whole = causal_attention(query, key, value, chunks=[(0, length)], seq_idx=seq_idx)
    places = torch.cat([torch.arange(*chunk) for chunk in chunks])
    part = causal_attention(query[places], key, value, chunks=chunks, seq_idx=seq_idx)
    torch.testing.assert_close(part, whole[places], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [64, 508])
@pytest.mark.parametrize("mean_document", [None, 3, 60])
@pytest.mark.parametrize("parts", [1, 2])
def test_without_a_mask(length: int, mean_document: int | None, parts: int) -> None:
    """Outputs and gradients where each query sees all keys of its document, for the whole text and
    for two of four chunks of it."""
    torch.manual_seed(0)
    size = length // 4
    chunks = [(0, length)] if parts == 1 else [(size, 2 * size), (2 * size, 3 * size)]
    places = torch.cat([torch.arange(*chunk) for chunk in chunks])
    query, key, value = (
        torch.randn(tokens, 2, n, 8, dtype=torch.float64, requires_grad=True)
        for tokens, n in ((len(places), 4), (length, 2), (length, 2))
    )
    seq_idx = None if mean_document is None else documents(2, length, mean_document)
    same_document = torch.zeros(2, length) if seq_idx is None else seq_idx
    output = full_attention(query, key, value, chunks=chunks, seq_idx=seq_idx)
    expected = naive_attention(query, key, value, places, None, same_document, causal=False)
    upstream = torch.randn_like(output)
    actual = (output, *torch.autograd.grad(output, (query, key, value), upstream))
    wanted = (expected, *torch.autograd.grad(expected, (query, key, value), upstream))
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_last_token_sees_all() -> None:
    """A decoding step: one query at the end of a cache."""
    torch.manual_seed(0)
    key, value = (torch.randn(77, 3, 2, 8, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    step = causal_attention(query, key, value, chunks=[(76, 77)])
    expected = naive_attention(query, key, value, torch.tensor([76]), None, torch.zeros(3, 77))
    torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-12)


def test_blocks_cover_the_queries_once() -> None:
    """Blocks are adjacent, none mixes a long document with others, masks stay small."""
    starts = [0, 5, 9, 900, 905, 3000]
    blocks = plan_blocks([(0, 4000)], starts, 4000, None)
    assert blocks[0].start == 0
    assert blocks[-1].stop == 4000
    assert all(a.stop == b.start for a, b in pairwise(blocks))
    for block in blocks:
        assert block.exactly_causal or block.stop - block.start <= 1024
