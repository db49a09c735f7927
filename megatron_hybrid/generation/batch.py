"""What one step computes: a token each of some sequences, parts of the prompts of others.

Legend: T tokens of the step: those of the B sequences that decode, then the chunks'. N, P, m: as in
`ops.paged_attention`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.generation.cache import States
from megatron_hybrid.generation.request import Sequence
from megatron_hybrid.ops.mamba2_texts import Texts
from megatron_hybrid.ops.paged_attention import PageTable


@dataclass
class Chunk:
    """Parts of prompts of the same length, all from the start; or one that goes on.

    Attributes:
        rows: where their tokens are among those of the step, one part after the other.
        start: the place in the text of the first token, without meta tokens.
        context: of one that goes on: its pages, and the place in the text of their first token.
        before: meta tokens before the text.
    """

    sequences: list[Sequence]
    rows: slice
    start: int
    length: int
    context: tuple[Tensor, int] | None = None
    before: int = 0


@dataclass
class Batch:
    """One step's work, on the device.

    Attributes:
        tokens: `[T]` int64; those of the meta tokens are their numbers.
        positions: `[T]` int64, their places in the text.
        places: `[T]` int64 each, the pages of their keys and values, and where in those they are;
            None without attention.
        decoding: how many sequences decode: slots 0 to B - 1.
        tables: of their pages, by the tokens that a layer sees at most (None: all); none where
            there are no pages.
        filling: the slots of the chunks' sequences, one after the other.
        texts: their layout.
        wanted: rows after which logits are wanted, int64; None for all.
        of_metas: whether its tokens are the meta tokens.
    """

    tokens: Tensor
    positions: Tensor
    places: tuple[Tensor, Tensor] | None
    decoding: int
    tables: dict[int | None, PageTable]
    chunks: list[Chunk]
    filling: Tensor | None = None
    texts: Texts | None = None
    wanted: Tensor | None = None
    of_metas: bool = False


class Batches:
    """Makes each step's `Batch`; what decodes is brought forward rather than made anew.

    A token more of the same sequences in the same pages adds one to each place; the tables are
    made again only when somebody comes, ends, or begins another page.

    Args:
        dtype: of keys and values.
    """

    def __init__(self, states: States, device: torch.device, dtype: torch.dtype) -> None:
        self.states, self.device, self.dtype = states, device, dtype
        self._version = -1
        self._batch: Batch | None = None
        self._mask = torch.empty(0)  # of the tables, [N, P]

    def make(self, sequences: list[Sequence], chunks: list[tuple[Sequence, int]]) -> Batch:
        """One step's work, for which pages are given out.

        Args:
            sequences: that decode: those of slots 0 to B - 1, in this order.
            chunks: whose prompts go on, and by how many tokens.
        """
        more = [*((sequence, 1) for sequence in sequences), *chunks]
        # All that is given back first, as other pages take the place of those.
        for sequence, _ in more:
            self.states.shrink(sequence)
        for sequence, length in more:
            self.states.grow(sequence, sequence.place + length)
        decoding = self._decoding(sequences) if sequences else None
        if not chunks:
            assert decoding is not None
            return decoding
        return self._with_chunks(decoding, chunks)

    def _decoding(self, sequences: list[Sequence]) -> Batch:
        tokens = torch.tensor([s.tokens[-1] for s in sequences], device=self.device)
        batch = self._batch
        windowed = self.states.windows != (None,)
        if batch is None or self._version != self.states.version or windowed:
            batch = self._batch = self._made(sequences, tokens)
            self._version = self.states.version
            return batch
        batch.tokens = tokens
        batch.positions.add_(1)
        if batch.places is not None:
            batch.places[1].add_(1)
            self._mask[batch.places] = 0.0
        return batch

    def _made(self, sequences: list[Sequence], tokens: Tensor) -> Batch:
        states = self.states
        positions = torch.tensor([s.place for s in sequences], device=self.device)
        if not states.paged:
            return Batch(tokens, positions, None, len(sequences), {}, [])
        size, count = states.limits.page_tokens, len(states.owners)
        row_of = {id(sequence): row for row, sequence in enumerate(sequences)}
        owner = [row_of.get(id(each), 0) for each in states.owners]
        first = [0] * count  # place in the text of each page's first token
        for sequence in sequences:
            for index, page in enumerate(sequence.pages, sequence.first_page):
                first[page] = index * size
        owners = torch.tensor(owner, device=self.device)
        text = torch.tensor(first, device=self.device)[:, None] + torch.arange(
            size, device=self.device
        )
        now = positions[owners][:, None]
        tables = {}
        for window in states.windows:
            hidden = text > now
            if window is not None:
                hidden |= (text <= now - window) & (text >= states.num_meta_tokens)
            self._mask = torch.zeros(count, size, dtype=self.dtype, device=self.device)
            self._mask.masked_fill_(hidden, -torch.inf)
            pages = [states.seen_pages(s, window) for s in sequences]
            tables[window] = self._table(owners, self._mask, pages)
        written = torch.tensor([states.page(s, s.place) for s in sequences], device=self.device)
        places = written, positions % size
        return Batch(tokens, positions, places, len(sequences), tables, [])

    def _table(self, owners: Tensor, mask: Tensor, pages: list[list[int]]) -> PageTable:
        """Of pages `[N]` with their mask `[N, P]`: those of each sequence."""
        most, padding = max(map(len, pages)), None
        if any(len(of) < most for of in pages):
            held = torch.tensor([len(of) for of in pages], device=self.device)
            missing = torch.arange(most, device=self.device) >= held[:, None]
            padding = missing.float().masked_fill_(missing, -torch.inf)[..., None, None]
        filled = torch.tensor([of + [0] * (most - len(of)) for of in pages], device=self.device)
        return PageTable(owners, mask[:, None, None], filled.view(-1), padding)

    def _with_chunks(self, decoding: Batch | None, chunks: list[tuple[Sequence, int]]) -> Batch:
        states, device = self.states, self.device
        first = 0 if decoding is None else decoding.decoding
        tokens: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        grouped: list[Chunk] = []
        fresh: dict[int, list[Sequence]] = {}
        for sequence, length in chunks:
            if sequence.place == 0:
                fresh.setdefault(length, []).append(sequence)
        work = [(0, length, group) for length, group in fresh.items()]
        work += [(s.seen, length, [s]) for s, length in chunks if s.place]
        for start, length, group in work:
            rows = slice(first + len(tokens), first + len(tokens) + length * len(group))
            for sequence in group:
                tokens += sequence.tokens[start : start + length]
                places = range(sequence.place, sequence.place + length)
                positions += places
                if states.paged:
                    pages += [states.page(sequence, place) for place in places]
            chunk = Chunk(group, rows, start, length, before=group[0].before)
            if group[0].place and states.paged:
                (sequence,) = group
                chunk.context = (
                    torch.tensor(sequence.pages, device=device),
                    sequence.first_page * states.limits.page_tokens,
                )
            grouped.append(chunk)

        def on_device(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        made = Batch(
            on_device(tokens), on_device(positions), None, first, {}, grouped,
            on_device([s.slot for chunk in grouped for s in chunk.sequences]),
            Texts([chunk.length for chunk in grouped for _ in chunk.sequences], device),
        )  # fmt: skip
        if states.paged:
            made.places = on_device(pages), made.positions % states.limits.page_tokens
        if decoding is not None:
            made.tokens = torch.cat((decoding.tokens, made.tokens))
            made.positions = torch.cat((decoding.positions, made.positions))
            if decoding.places is not None and made.places is not None:
                one, other = map(torch.cat, zip(decoding.places, made.places, strict=True))
                made.places = one, other
            made.tables = decoding.tables
        return made
