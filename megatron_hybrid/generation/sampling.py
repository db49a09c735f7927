"""The next token of each of many sequences, and its log-probability.

A draw is a function of a request's seed, the continuation and the place in it, and of the logits:
never of what else is in the batch, of the device, or of earlier draws.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_hybrid.generation.params import SamplingParams
from megatron_hybrid.generation.request import Sequence, TokenLogprob

_MASK = 2**64 - 1
# How many of the likeliest are sorted first, where only the likeliest count.
_LIKELIEST = 1024


def uniform_draws(seeds: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each pair of a seed and a place, by SplitMix64.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
    """
    with np.errstate(over="ignore"):
        z = seeds + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_key(seed: int, continuation: int) -> int:
    """Where the draws of a continuation begin."""
    start = np.array([seed & _MASK], np.uint64)
    mixed = uniform_draws(start, np.array([continuation], np.uint64))
    return (seed + int(mixed[0] * 2.0**53) * 0x9E3779B97F4A7C15 + continuation) & _MASK


class Sampler:
    """Draws for the rows of a step; made again when other sequences are in it.

    Args:
        sequences: of the rows.
    """

    def __init__(self, sequences: Rows[Sequence], device: torch.device) -> None:
        self.sequences = list(sequences)
        self.params = [s.params for s in sequences]
        self.device = device
        drawn = [i for i, p in enumerate(self.params) if p.temperature > 0]
        self.greedy = not drawn
        self.rows = None
        if drawn and len(drawn) < len(self.params):
            self.rows = torch.tensor(drawn, device=device)
        chosen = [self.params[i] for i in drawn]
        self.drawn = drawn
        self.keys = np.array(
            [draw_key(self.params[i].seed, sequences[i].continuation) for i in drawn], np.uint64
        )
        self.penalized = [i for i, p in enumerate(self.params) if p.repetition_penalty != 1]
        self.temperature = _column(chosen, "temperature", device)
        self.top_k = [p.top_k for p in chosen]
        self.top_p = _column(chosen, "top_p", device)
        self.min_p = _column(chosen, "min_p", device)
        self.any_top_p = any(p.top_p < 1 for p in chosen)
        self.any_min_p = any(p.min_p > 0 for p in chosen)
        self.told = [i for i, p in enumerate(self.params) if p.logprobs is not None]

    def choose(self, logits: Tensor) -> list[int]:
        """The next token of each row from logits `[R, V]`, fp32."""
        if self.penalized:
            logits = self._penalize(logits)
        if self.greedy:
            found: list[int] = logits.argmax(-1).tolist()
            return found
        tokens = logits.argmax(-1).tolist() if self.rows is not None else [0] * len(logits)
        own = logits if self.rows is None else logits[self.rows]
        places = np.array([self.sequences[i].new_tokens for i in self.drawn], np.uint64)
        draws = torch.from_numpy(uniform_draws(self.keys, places)).to(self.device)
        for i, token in zip(self.drawn, self._draw(own, draws).tolist(), strict=True):
            tokens[i] = token
        return tokens

    def _penalize(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for i in self.penalized:
            before = torch.tensor(list(set(self.sequences[i].tokens)), device=self.device)
            values, penalty = logits[i, before], self.params[i].repetition_penalty
            logits[i, before] = torch.where(values > 0, values / penalty, values * penalty)
        return logits

    def _draw(self, logits: Tensor, draws: Tensor) -> Tensor:
        """`[R, V]` fp32 and `[R]` float64 in [0, 1) -> `[R]` int64."""
        # The largest as 0, which no temperature makes infinite.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if any(self.top_k):
            logits = logits.masked_fill(logits < self._kth(logits), -torch.inf)
        shares = torch.softmax(logits, dim=-1)
        if self.any_top_p:
            shares = shares.masked_fill(shares < self._least(shares), 0.0)
        if self.any_min_p:
            least = shares.amax(-1, keepdim=True) * self.min_p
            shares = shares.masked_fill(shares < least, 0.0)
        # In order of the vocabulary, where rounding can only move an edge.
        sums = shares.double().cumsum(-1)
        found = torch.searchsorted(sums, (draws * sums[:, -1]).unsqueeze(1), right=True)
        return found.squeeze(1).clamp_(max=logits.shape[-1] - 1)

    def _kth(self, logits: Tensor) -> Tensor:
        """The k-th largest of each row, `[R, 1]`; of those without a k the least there is."""
        size = logits.shape[-1]
        ks = [min(k, size) or size for k in self.top_k]
        few = [k if self.top_k[i] else 1 for i, k in enumerate(ks)]
        largest = torch.topk(logits, max(few)).values
        index = torch.tensor(few, device=self.device)[:, None] - 1
        kth = largest.gather(1, index)
        unlimited = torch.tensor([not k for k in self.top_k], device=self.device)[:, None]
        return kth.masked_fill(unlimited, -torch.inf)

    def _least(self, shares: Tensor) -> Tensor:
        """The smallest share that top-p keeps, `[R, 1]`: those before it have not reached p yet."""
        size = shares.shape[-1]
        count = min(size, _LIKELIEST)
        while True:
            likeliest = torch.topk(shares, count).values
            before = likeliest.cumsum(-1) - likeliest
            kept = (before < self.top_p).sum(-1, keepdim=True)
            if count == size or bool((kept < count).all()):
                return likeliest.gather(1, kept - 1)
            count = size

    def logprobs(self, logits: Tensor, tokens: Rows[int]) -> list[TokenLogprob | None]:
        """What is to be told of the chosen tokens, by the model's own logits `[R, V]`."""
        told: list[TokenLogprob | None] = [None] * len(tokens)
        if self.told:
            own = logits[self.told]
            chosen = [tokens[i] for i in self.told]
            tops = [self.params[i].logprobs or 0 for i in self.told]
            for i, found in zip(self.told, token_logprobs(own, chosen, tops), strict=True):
                told[i] = found
        return told


def token_logprobs(logits: Tensor, tokens: Rows[int], tops: Rows[int]) -> list[TokenLogprob]:
    """Log-probabilities of a token a row, and of the likeliest `tops` of each, from `[R, V]`."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    index = torch.tensor(list(tokens), device=logits.device)[:, None]
    chosen = logprobs.gather(1, index).squeeze(1).tolist()
    most = min(max(tops, default=0), logits.shape[-1])
    if not most:
        return [TokenLogprob(value) for value in chosen]
    best = torch.topk(logprobs, most)
    pairs = [
        tuple(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [
        TokenLogprob(value, row[:top]) for value, row, top in zip(chosen, pairs, tops, strict=True)
    ]


def _column(params: list[SamplingParams], name: str, device: torch.device) -> Tensor:
    values = [getattr(p, name) for p in params]
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
