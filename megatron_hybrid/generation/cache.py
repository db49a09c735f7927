"""What sequences under way leave behind: pages of keys and values, slots of Mamba's states.

Everything is allocated once. Pages in use are always the first ones, as slots of sequences that
decode are: the last takes the place of one that is given back, so that a step computes on plain
views, without gathering or skipping anything.

Legend: S slots, N pages of P tokens, k key/value heads of d channels of this rank.
"""

import torch
from torch import Tensor

from megatron_hybrid.generation.params import Limits
from megatron_hybrid.generation.request import Sequence


class MambaSlots:
    """The states of one Mamba layer, `[S, ...]` each: of the convolution, and of the scan."""

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What moves with a sequence."""
        return self.conv, self.ssm


class Pages:
    """Keys and values of one attention layer, `[N, k, P, d]` each.

    Args:
        channels: d of keys, and of values.
    """

    def __init__(
        self,
        pages: int,
        tokens: int,
        heads: int,
        channels: tuple[int, int],
        dtype: torch.dtype,
        device: object,
    ) -> None:
        # Not zeros: the system hands out memory as pages are written to.
        self.keys, self.values = (
            torch.empty(pages, heads, tokens, each, dtype=dtype, device=device)  # type: ignore[call-overload]
            for each in channels
        )


class States:
    """Of all layers of this rank, and who has which.

    Args:
        mamba: of each Mamba layer.
        attention: of each attention layer.
        windows: of all layers, on whatever rank: tokens that attention sees at most; None for all.
        pages: of each attention layer.
        paged: whether any rank has an attention layer: pages are given out alike on all.
        num_meta_tokens: before each text, which all layers see; they have a slot, the last one.
    """

    def __init__(
        self,
        limits: Limits,
        mamba: list[MambaSlots],
        attention: list[Pages],
        windows: tuple[int | None, ...],
        *,
        pages: int,
        paged: bool,
        num_meta_tokens: int = 0,
    ) -> None:
        self.limits, self.mamba, self.attention, self.windows = limits, mamba, attention, windows
        # Pages are given back that no layer sees.
        widest = [window for window in windows if window is not None]
        self.num_meta_tokens = num_meta_tokens
        every = len(widest) < len(windows) or num_meta_tokens
        self.window = None if every else max(widest)
        self.page_limit, self.paged = pages, paged
        self.owners: list[Sequence] = []  # of the pages in use
        self.reserved_pages = 0
        self._touched = 0  # pages that were ever in use
        slots = limits.max_sequences + bool(num_meta_tokens)
        self.slots: list[Sequence | None] = [None] * slots
        self.version = 0  # of who has which page and slot

    # -- admission ---------------------------------------------------------------------------------

    def pages_needed(self, tokens: int) -> int:
        """The most pages that a sequence of so many tokens has at once."""
        size = self.limits.page_tokens
        if not self.paged:
            return 0
        if self.window is not None:
            # A chunk is written before what leaves the window is given back.
            tokens = min(tokens, self.window + self.limits.prefill_tokens + size)
        return -(-tokens // size)

    def room(self, sequences: int, pages: int) -> bool:
        """Whether so many sequences of so many pages each can begin now."""
        return (
            self.slots.count(None) >= sequences
            and self.reserved_pages + sequences * pages <= self.page_limit
        )

    def admit(self, sequence: Sequence, pages: int, slot: int | None = None) -> None:
        """Give a sequence a slot, with nothing in it, and keep so many pages for it."""
        slot = self.slots.index(None) if slot is None else slot
        self.slots[slot] = sequence
        sequence.slot, sequence.reserved_pages = slot, pages
        self.reserved_pages += pages
        self.empty(sequence)

    def empty(self, sequence: Sequence) -> None:
        """Have a sequence's slot as before its first token."""
        for layer in self.mamba:
            for tensor in layer.tensors():
                tensor[sequence.slot].zero_()

    # -- slots -------------------------------------------------------------------------------------

    def swap(self, a: int, b: int) -> None:
        """Two slots change places, or the same one means something else from now on."""
        self.version += 1
        if a == b:
            return
        first, second = self.slots[a], self.slots[b]
        for layer in self.mamba:
            for tensor in layer.tensors():
                if first is None or second is None:
                    full, empty = (b, a) if first is None else (a, b)
                    tensor[empty].copy_(tensor[full])
                else:
                    tensor[[a, b]] = tensor[[b, a]]
        self.slots[a], self.slots[b] = second, first
        for slot in (a, b):
            if (sequence := self.slots[slot]) is not None:
                sequence.slot = slot

    def fork(self, source: Sequence, target: Sequence) -> None:
        """`target`, which has a slot, goes on from where `source` is."""
        for layer in self.mamba:
            for tensor in layer.tensors():
                tensor[target.slot].copy_(tensor[source.slot])
        for page in source.pages:
            copy = self._new_page(target)
            for pool in self.attention:
                pool.keys[copy].copy_(pool.keys[page])
                pool.values[copy].copy_(pool.values[page])
        target.first_page, target.seen = source.first_page, source.place - target.before
        self.version += 1

    # -- pages -------------------------------------------------------------------------------------

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Pages for the first `tokens` tokens of a sequence, without those that nobody sees."""
        if not self.paged:
            return
        size = self.limits.page_tokens
        while (sequence.first_page + len(sequence.pages)) * size < tokens:
            self._new_page(sequence)
            self.version += 1

    def shrink(self, sequence: Sequence) -> None:
        """Give back pages that lie before the window of the next token."""
        for _ in range(self.unseen_pages(sequence, self.window)):
            self._drop_page(sequence.pages.pop(0))
            sequence.first_page += 1
            self.version += 1

    def unseen_pages(self, sequence: Sequence, window: int | None) -> int:
        """How many of its first pages lie before a window of the next token."""
        if window is None:
            return 0
        whole = (sequence.place - window + 1) // self.limits.page_tokens - sequence.first_page
        return min(max(whole, 0), len(sequence.pages))

    def seen_pages(self, sequence: Sequence, window: int | None) -> list[int]:
        """Its pages but for those that `unseen_pages` counts, with those of meta tokens."""
        of_metas = -(-self.num_meta_tokens // self.limits.page_tokens)
        unseen = max(self.unseen_pages(sequence, window), of_metas)
        return sequence.pages[:of_metas] + sequence.pages[unseen:]

    def page(self, sequence: Sequence, token: int) -> int:
        """The page of a token's key and value."""
        return sequence.pages[token // self.limits.page_tokens - sequence.first_page]

    def release(self, sequence: Sequence) -> None:
        """Take everything back from a sequence that has ended."""
        while sequence.pages:
            self._drop_page(sequence.pages.pop())
        if sequence.slot >= 0:
            self.slots[sequence.slot] = None
            sequence.slot = -1
        self.reserved_pages -= sequence.reserved_pages
        sequence.reserved_pages = 0
        self.version += 1

    def _new_page(self, sequence: Sequence) -> int:
        page = len(self.owners)
        assert page < self.page_limit, "no sequence takes more than was kept for it"
        self.owners.append(sequence)
        sequence.pages.append(page)
        if page >= self._touched:
            self._touched = page + 1
            for pool in self.attention:
                # What was never written must be finite: its weight is 0, and 0 * NaN is NaN.
                pool.keys[page].zero_()
                pool.values[page].zero_()
        return page

    def _drop_page(self, page: int) -> None:
        """The last page in use takes the place of one that is no longer."""
        last = len(self.owners) - 1
        owner = self.owners.pop()
        if page == last:
            return
        for pool in self.attention:
            pool.keys[page].copy_(pool.keys[last])
            pool.values[page].copy_(pool.values[last])
        self.owners[page] = owner
        owner.pages[owner.pages.index(last)] = page
