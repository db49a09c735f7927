"""Draws come from the tokens that a request's parameters name, in the shares that they define."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Limits, SamplingParams, TextStream
from megatron_hybrid.generation.request import Sequence
from megatron_hybrid.generation.sampling import Sampler, draw_key, token_logprobs, uniform_draws


def sampler(*params: SamplingParams, prompt: tuple[int, ...] = (0,)) -> Sampler:
    sequences = [
        Sequence.of(i, 0, each, list(prompt), [], before=0) for i, each in enumerate(params)
    ]
    return Sampler(sequences, torch.device("cpu"))


def shares(params: SamplingParams, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    rows = [SamplingParams(**{**vars(params), "seed": seed}) for seed in range(draws)]
    tokens = torch.tensor(sampler(*rows).choose(logits.expand(draws, -1)))
    return torch.bincount(tokens, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.81}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.25}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_shares(params: dict[str, Any], expected: list[float]) -> None:
    """Temperature and filters, alone and together, give the shares that they define, to 3%."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    found = shares(SamplingParams(**params), logits)
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=0.03, rtol=0)


def test_a_row_is_drawn_as_it_is_alone() -> None:
    """Greedy and sampled rows of one batch, each as by itself; of more tokens than are sorted."""
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) / 4
    rows = [
        SamplingParams(), SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=1.0, top_p=0.97, seed=3), SamplingParams(repetition_penalty=5.0),
        SamplingParams(temperature=2.0, top_k=50, seed=9),
        SamplingParams(temperature=1.0, min_p=0.2, seed=9),
    ]  # fmt: skip
    together = sampler(*rows).choose(logits)
    alone = [sampler(each).choose(logits[i : i + 1])[0] for i, each in enumerate(rows)]
    assert together == alone


def test_a_penalty_is_for_tokens_that_were_there() -> None:
    """Positive logits are divided and negative ones multiplied, of each token once."""
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    penalized = SamplingParams(repetition_penalty=2.0)
    assert sampler(penalized, prompt=(0, 0)).choose(logits) == [1]
    assert sampler(penalized, prompt=(0, 1)).choose(logits) == [0]
    assert sampler(penalized, prompt=(0, 1)).choose(-logits) == [2]
    assert logits.tolist() == [[2.0, 1.5, -1.0]]


def test_logprobs() -> None:
    """Of the chosen token and of as many of the likeliest as each row asks for."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]).log() + 7
    first, second = token_logprobs(logits, [2, 1], [0, 2])
    assert first.logprob == pytest.approx(math.log(0.2)) and first.top == ()
    assert [token for token, _ in second.top] == [1, 2]
    assert [p for _, p in second.top] == pytest.approx([math.log(0.5), math.log(0.3)])


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_draws_are_uniform_and_each_their_own(seed: int) -> None:
    """Draws of a seed spread evenly; continuations and places have draws of their own."""
    keys = np.array([draw_key(seed, i) for i in range(4)], np.uint64)
    draws = np.stack([uniform_draws(keys, np.full(4, place, np.uint64)) for place in range(5000)])
    assert len(set(draws.flatten().tolist())) == draws.size
    assert ((draws >= 0) & (draws < 1)).all()
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert np.abs(counts / draws.size - 0.05).max() < 0.005
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.06


def test_what_is_wrong_is_named_at_once() -> None:
    """Every field with its value in one message."""
    with pytest.raises(UserError) as error:
        SamplingParams(
            temperature=-1, top_k=-2, top_p=0, min_p=2, repetition_penalty=0, n=0, seed=2**64,
            max_new_tokens=-1, logprobs=-3, stop=("",),
        )  # fmt: skip
    for text in ("temperature=-1", "top_k=-2", "top_p=0", "min_p=2", "repetition_penalty=0", "n=0",
                 f"seed={2**64}", "max_new_tokens=-1", "logprobs=-3", "stop=''"):  # fmt: skip
        assert text in str(error.value)
    with pytest.raises(UserError, match=r"stop='ab' must be texts"):
        SamplingParams(stop="ab")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"max_sequences=0(.|\n)*page_tokens=True"):
        Limits(max_sequences=0, page_tokens=True)


def test_a_temperature_that_is_none_is_refused() -> None:
    """NaN, and what float32 cannot hold; the least that there is picks the likeliest."""
    for temperature in (float("nan"), float("inf"), 1e-40, 1e40):
        with pytest.raises(UserError, match="temperature"):
            SamplingParams(temperature=temperature)
    least = [SamplingParams(temperature=1e-37, seed=seed) for seed in range(5)]
    assert sampler(*least).choose(torch.tensor([1.0, 30.0, -5.0]).expand(5, -1)) == [1] * 5


class Bytes:
    """A tokenizer of bytes, of which a character has several."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "rest"),
    [
        ("añ€b", (), ["a", "", "ñ", "", "", "€", "b"], ""),
        ("a€"[:2] + "x", (), ["a", "", "", "€", "x"], ""),
        ("one two", ("twig", "o"), ["", "", "", "", "", "", ""], ""),
        ("1 2 34", ("3", "2 9"), ["1", " ", "", "", "2 ", ""], ""),
        ("1 2", ("2 9",), ["1", " ", ""], "2"),
    ],
)
def test_streamed_text(text: str, stop: tuple[str, ...], pieces: list[str], rest: str) -> None:
    """Whole characters as soon as they are there; what may begin a stop text is held back."""
    stream = TextStream(Bytes(), [120, 121], stop)  # type: ignore[arg-type]
    got = [stream.add(each) for each in text.encode()]
    assert got == pieces[: len(got)] and stream.finish() == rest
    assert stream.stopped == any(each in text for each in stop)
    assert stream.text == "".join(pieces) + rest


def test_a_text_that_ends_within_a_character() -> None:
    """What is left is shown as what stands for a part of one."""
    stream = TextStream(Bytes(), [], ())  # type: ignore[arg-type]
    assert [stream.add(each) for each in "b€".encode()[:-1]] == ["b", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}" and not stream.stopped
