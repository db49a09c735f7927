"""What a step draws and tells: whose the rows of its logits are, and what comes of them.

Legend: R rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch
from megatron_hybrid.generation.request import Sequence, TokenLogprob
from megatron_hybrid.generation.sampling import Sampler, token_logprobs


class Part(NamedTuple):
    """Of a prompt whose tokens are told of.

    Attributes:
        rows: of the logits that tell of them.
        places: of the tokens, in the text.
    """

    sequence: Sequence
    rows: slice
    places: range


class Wanted(NamedTuple):
    """Whose the rows of a step's logits are.

    Attributes:
        rows: sequences that get a token each.
        parts: of prompts, whose rows follow.
    """

    rows: list[Sequence]
    parts: list[Part]


class Drawn(NamedTuple):
    """Tokens of the rows, what is told of them, and what of each part."""

    tokens: list[int]
    told: list[TokenLogprob | None]
    parts: list[list[TokenLogprob]]


def wanted(batch: Batch, decoding: list[Sequence]) -> Wanted:
    """What is wanted of a step; `batch.wanted` says so to the model.

    Its rows are of the sequences that decode, then of those whose prompts end here and of which a
    token is to be drawn.
    """
    rows = list(decoding)
    if not batch.chunks:
        return Wanted(rows, [])
    numbers = list(range(batch.decoding))
    told: list[tuple[Sequence, int, range]] = []  # of which tokens, after which row the first
    for chunk in batch.chunks:
        for index, sequence in enumerate(chunk.sequences):
            first = chunk.rows.start + index * chunk.length
            end = chunk.start + chunk.length
            family = (sequence, *sequence.siblings) if end == sequence.goal else (sequence,)
            if end == sequence.prompt_tokens and sequence.params.max_new_tokens:
                rows += family
                numbers += [first + chunk.length - 1] * len(family)
            # The logits after a token tell of the next; after the prompt's last of a new one.
            for each in family:
                begin = chunk.start + 1 if each is sequence else end
                begin, stop = max(begin, each.told.start), min(end + 1, each.told.stop)
                if begin < stop:
                    told.append((each, first - chunk.start - 1 + begin, range(begin, stop)))
    parts = []
    for sequence, row, places in told:
        parts.append(Part(sequence, slice(len(numbers), len(numbers) + len(places)), places))
        numbers += range(row, row + len(places))
    batch.wanted = torch.tensor(numbers, dtype=torch.long, device=batch.tokens.device)
    return Wanted(rows, parts)


class Drawer:
    """Draws for the steps of an engine.

    Args:
        vocab_size: tokens that may be drawn; rows of the output beyond it are padding.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._sampler = Sampler([], device)

    def draw(self, logits: Tensor, wanted: Wanted) -> Drawn:
        """From logits `[R, V]`, fp32."""
        logits, (rows, parts) = logits[:, : self._vocab_size], wanted
        if self._sampler.sequences != rows:
            self._sampler = Sampler(rows, self._device)
        tokens: list[int] = []
        told: list[TokenLogprob | None] = []
        if rows:
            own = logits[: len(rows)]
            tokens = self._sampler.choose(own)
            told = self._sampler.logprobs(own, tokens)
        prompts: list[list[TokenLogprob]] = []
        for sequence, own_rows, places in parts:
            following = sequence.tokens[places.start : places.stop]
            tops = [sequence.params.logprobs or 0] * len(following)
            prompts.append(token_logprobs(logits[own_rows], following, tops))
        return Drawn(tokens, told, prompts)
