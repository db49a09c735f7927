"""Attention of one query a sequence to its pages of keys and values, which differ in number.

Every page is attended to by itself, all at once; a sequence's answers are then weighed by how much
each of its pages counts (the sums of exponentials that softmax divides by).

Legend: B sequences, N pages of P tokens, m the most pages of a sequence, k key/value heads, r query
heads for each, d channels of queries and keys; values may have others.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PageTable(NamedTuple):
    """Which page is whose.

    Attributes:
        owner: `[N]` int64, the sequence of each page; any for a page of none.
        mask: `[N, 1, 1, P]`, 0 where the page has a token that is seen, else -inf; dtype of keys.
        pages: `[B * m]` int64, the pages of each sequence; any where it has fewer.
        padding: `[B, m, 1, 1]` fp32, 0, or -inf where it has fewer; None if none has.
    """

    owner: Tensor
    mask: Tensor
    pages: Tensor
    padding: Tensor | None


def paged_attention(
    query: Tensor, keys: Tensor, values: Tensor, table: PageTable, scale: float
) -> Tensor:
    """Softmax attention of `query` `[B, k, r, d]` to `keys` and `values` `[N, k, P, d]`.

    Returns:
        `[B, k, r, d]` with values' channels, dtype of the keys.
    """
    by_page = query.index_select(0, table.owner)
    alike = keys.shape[-1] == values.shape[-1]  # channels, or torch's kernel does not take them
    attend = _flash if keys.device.type == "cpu" and alike else _plain
    answers, log_sums = attend(by_page, keys, values, table.mask, scale)
    batch, most = query.shape[0], table.pages.shape[0] // query.shape[0]
    answers = answers.index_select(0, table.pages)
    if most == 1:
        return answers
    log_sums = log_sums.index_select(0, table.pages).view(batch, most, *log_sums.shape[1:])
    if table.padding is not None:
        log_sums = log_sums + table.padding
    weights = torch.softmax(log_sums, dim=1).unsqueeze(-1)
    answers = answers.view(batch, most, *answers.shape[1:])
    return (answers * weights).sum(1).to(keys.dtype)


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Answers `[N, k, r, d]` and log-sums `[N, k, r]`; the group's queries as so many tokens."""
    answers: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, False, attn_mask=mask, scale=scale
    )
    return answers[0], answers[1].view(query.shape[:3])


def _plain(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same from plain operations, on any device."""
    scores = torch.matmul(query, keys.mT).float() * scale + mask.float()
    log_sums = scores.logsumexp(-1)
    # A page of which nothing is seen has no share in any answer, and must not be NaN: 0 * NaN is.
    lowest = torch.finfo(log_sums.dtype).min
    shares = torch.exp(scores - log_sums.clamp(min=lowest)[..., None])
    return torch.matmul(shares.to(values.dtype), values), log_sums
