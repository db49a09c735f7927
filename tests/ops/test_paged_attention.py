"""Attention to pages: as over a whole sequence, whichever pages it has, by either kernel."""

import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.ops import paged_attention as module
from megatron_hybrid.ops.paged_attention import PageTable, paged_attention

PAGE, HEADS, QUERIES, CHANNELS = 4, 2, 3, 8
LENGTHS = (1, 4, 5, 11)
PAGES = ((3,), (0,), (6, 2), (5, 1, 4))  # in order of the text; page 7 is nobody's


@pytest.mark.parametrize(
    ("kernel", "of_values"), [("_flash", CHANNELS), ("_plain", CHANNELS), ("_flash", 12)]
)
@pytest.mark.parametrize("rows", [(0, 1), (0, 1, 2, 3)], ids=str)
def test_equals_attention_to_the_whole(
    kernel: str, of_values: int, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of other lengths, one page each or up to three; what is beyond does not count.

    Values may have other channels than keys, and of a page nothing may be seen.
    """
    monkeypatch.setattr(module, "_flash", getattr(module, kernel))
    draws = torch.Generator().manual_seed(0)
    keys = torch.randn(8, HEADS, PAGE, CHANNELS, generator=draws)
    values = torch.randn(8, HEADS, PAGE, of_values, generator=draws)
    query = torch.randn(len(rows), HEADS, QUERIES, CHANNELS, generator=draws)
    most = max(len(PAGES[row]) for row in rows)
    owner, mask = torch.zeros(8, dtype=torch.long), torch.zeros(8, PAGE)
    pages, padding = torch.zeros(len(rows), most, dtype=torch.long), torch.zeros(len(rows), most)
    for place, row in enumerate(rows):
        padding[place, len(PAGES[row]) :] = -torch.inf
        for number, page in enumerate(PAGES[row]):
            owner[page], pages[place, number] = place, page
            mask[page, max(LENGTHS[row] - number * PAGE, 0) :] = -torch.inf
    # The page that fills up where a sequence has fewer: its owner sees nothing of it.
    mask[0] = -torch.inf if 1 not in rows else mask[0]
    table = PageTable(owner, mask[:, None, None], pages.view(-1), padding[..., None, None])
    found = paged_attention(query, keys, values, table, 0.3)
    for place, row in enumerate(rows):
        held = (pool[list(PAGES[row])].transpose(0, 1).flatten(1, 2) for pool in (keys, values))
        key, value = (each[None, :, : LENGTHS[row]] for each in held)
        want = F.scaled_dot_product_attention(query[place : place + 1], key, value, scale=0.3)
        torch.testing.assert_close(found[place], want[0])
