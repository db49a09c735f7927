"""Attention on any device by torch's SDPA: windows, documents and parts of a sequence.

SDPA is fast where the mask is exactly causal and slow where it is given as a tensor. So the queries
are cut in blocks for which the keys form one range, most of them exactly causal; the rest get a
small mask of their own. No mask of the whole sequence is ever made.

Legend: s queries, l keys, b batch, n query heads, k key/value heads, d head size.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_hybrid.ops.attention_blocks import Block, plan_blocks
from megatron_hybrid.ops.bf16 import through_fp32


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunks: Sequence[tuple[int, int]],
    window: int | None = None,
    seq_idx: Tensor | None = None,
    num_meta_tokens: int = 0,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query to the keys up to its own place in the text.

    Args:
        query: `[s, b, n, d]`, the tokens of `chunks`, one after the other.
        key, value: `[l, b, k, d]` of the whole text; n divisible by k. Values may have other
            channels than keys.
        chunks: (first, last + 1) places in the text of the queries; sizes add up to s.
        window: how many tokens a query sees, itself included; None for all.
        seq_idx: `[b, l]`, number of the document of each token; a query sees only its own.
        num_meta_tokens: the first tokens of the text, which are seen whatever the window and the
            document.
        dropout: of the attention weights.
        scale: of the logits; None for 1 / sqrt(d).

    Returns:
        `[s, b, n * d]`, d of the values, dtype of the query.
    """
    wanted = value.shape[-1]
    if query.shape[-1] != wanted:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        query, key, value = _of_equal_channels(query, key, value)
    if seq_idx is None:
        documents: list[list[int]] = [[0]]
        rows = [slice(None)]
    else:
        documents = [_document_starts(row) for row in seq_idx]
        rows = [slice(i, i + 1) for i in range(query.shape[1])]
    outputs = [
        _attend_rows(
            query[:, row],
            key[:, row],
            value[:, row],
            plan_blocks(chunks, starts, key.shape[0], window, num_meta_tokens),
            window,
            starts,
            num_meta_tokens,
            dropout,
            scale,
        )
        for row, starts in zip(rows, documents, strict=True)
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if value.shape[-1] != wanted:
        output = output.unflatten(-1, (-1, value.shape[-1]))[..., :wanted].flatten(-2)
    return output


def _of_equal_channels(*tensors: Tensor) -> Iterator[Tensor]:
    """Filled up with zeros, which add nothing to products: torch's fast kernels take no others."""
    most = max(tensor.shape[-1] for tensor in tensors)
    for tensor in tensors:
        missing = most - tensor.shape[-1]
        yield F.pad(tensor, (0, missing)) if missing else tensor


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunks: Sequence[tuple[int, int]],
    seq_idx: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query to all keys of its document; as `causal_attention` else."""
    if seq_idx is None:
        rows = [slice(None)]
        ranges = [[(query.shape[0], 0, key.shape[0])]]
    else:
        rows = [slice(i, i + 1) for i in range(query.shape[1])]
        ranges = [
            _document_ranges([*_document_starts(row), key.shape[0]], chunks) for row in seq_idx
        ]
    outputs = []
    for row, parts in zip(rows, ranges, strict=True):
        # SDPA: [batch, heads, tokens, head size]
        q, k, v = (t[:, row].permute(1, 2, 0, 3) for t in (query, key, value))
        attend = _attend_through_fp32 if through_fp32(q) else F.scaled_dot_product_attention
        attended = [
            attend(
                queries, k[:, :, first:stop], v[:, :, first:stop],
                dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            )
            for queries, (_, first, stop) in zip(
                q.split([size for size, _, _ in parts], dim=2), parts, strict=True
            )
        ]  # fmt: skip
        output = attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)
        outputs.append(output.permute(2, 0, 1, 3).flatten(2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _document_ranges(
    ends: list[int], chunks: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """For each document's part of each chunk: its queries, and the first and last + 1 key.

    Args:
        ends: first token of each document, and the length of the text.
    """
    return [
        (min(stop, end) - max(start, first), first, end)
        for start, stop in chunks
        for first, end in pairwise(ends)
        if first < stop and end > start
    ]


def _document_starts(seq_idx: Tensor) -> list[int]:
    """First token of each document of one row `[l]`."""
    changes = torch.nonzero(seq_idx[1:] != seq_idx[:-1]).flatten() + 1
    return [0, *changes.tolist()]


def _attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: list[Block],
    window: int | None,
    starts: list[int],
    num_meta_tokens: int,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """`[s, b, n, d]` -> `[s, b, n * d]` for rows with the same documents."""
    # SDPA: [batch, heads, tokens, head size]
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    attend = _attend_through_fp32 if through_fp32(query) else F.scaled_dot_product_attention
    outputs = []
    done = 0
    for block in blocks:
        size = block.stop - block.start
        mask = None
        if not block.exactly_causal:
            mask = _mask(block, window, starts, num_meta_tokens, query.device)
        outputs.append(
            attend(
                query[:, :, done : done + size],
                _seen(key, block),
                _seen(value, block),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=block.exactly_causal,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
        done += size
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output.permute(2, 0, 1, 3).flatten(2)


def _seen(tensor: Tensor, block: Block) -> Tensor:
    """What of keys or values `[b, k, l, d]` a block gets."""
    if block.metas in (0, block.key_start):
        return tensor[:, :, block.key_start - block.metas : block.stop]
    parts = tensor[:, :, : block.metas], tensor[:, :, block.key_start : block.stop]
    return torch.cat(parts, dim=2)


def _attend_through_fp32(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA of bf16 `[b, n, s, d]` and `[b, k, l, d]`, computed in fp32 and rounded to bf16.

    One key/value head at a time, so that the fp32 copies are small; what is kept for the backward
    pass is bf16.
    """
    by_head = (tensor.chunk(key.shape[1], dim=1) for tensor in (query, key, value))
    outputs = []
    for heads in zip(*by_head, strict=True):
        with saved_tensors_hooks(_to_bf16, _to_fp32):
            output = F.scaled_dot_product_attention(*(part.float() for part in heads), **options)
        outputs.append(output.to(torch.bfloat16))
    return torch.cat(outputs, dim=1)


def _to_bf16(saved: Tensor) -> Tensor:
    """What SDPA keeps that has tokens and channels; the log-sum-exps `[b, n, s]` stay fp32."""
    return saved.to(torch.bfloat16) if saved.dim() == 4 else saved


def _to_fp32(kept: Tensor) -> Tensor:
    return kept.float() if kept.dtype == torch.bfloat16 else kept


def _mask(
    block: Block,
    window: int | None,
    starts: list[int],
    num_meta_tokens: int,
    device: torch.device,
) -> Tensor | None:
    """Which key each query of a block sees, `[queries, keys]` bool; None where it is every one."""
    if block.stop - block.start == 1 and window is None and starts[-1] <= block.key_start:
        return None
    queries = torch.arange(block.start, block.stop, device=device)
    metas = torch.arange(block.metas, device=device)
    keys = torch.cat((metas, torch.arange(block.key_start, block.stop, device=device)))
    distance = queries[:, None] - keys
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    if len(starts) > 1:
        firsts = torch.tensor(starts, device=device)
        document_of = torch.bucketize(keys, firsts, right=True)
        mask &= document_of[-len(queries) :, None] == document_of
    if num_meta_tokens:
        mask |= (keys < num_meta_tokens) & (distance >= 0)
    return mask
