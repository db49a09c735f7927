"""The engine as a server meets it: requests at any time, through few slots, some given up."""

import random
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Event, Limits, SamplingParams
from megatron_hybrid.testing import run_distributed
from tests.generation.models import VOCAB_SIZE, built, small_config

REQUESTS, WARM, SLOTS = 500, 150, 8
GROWTH_MIB = 3.0


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def traffic() -> list[tuple[list[int], SamplingParams]]:
    """Random lengths, ways to draw and stop texts."""
    draws = random.Random(7)
    return [
        (
            [draws.randrange(VOCAB_SIZE) for _ in range(draws.randint(1, 30))],
            SamplingParams(
                max_new_tokens=draws.randint(0, 7), temperature=draws.choice([0, 0.8, 1.5]),
                seed=i, n=draws.choice([1, 1, 1, 3]), stop=draws.choice([(), ("7", "12"), ("3 ",)]),
            ),
        )
        for i in range(REQUESTS)
    ]  # fmt: skip


def served() -> tuple[list[list[Event]], set[int], float]:
    """On a rank: the events of each request, which were given up, and by how much memory grew."""
    requests, draws = traffic(), random.Random(8)
    told: list[list[Event]] = [[] for _ in requests]
    given_up: set[int] = set()
    limits = Limits(max_sequences=SLOTS, max_tokens=400, prefill_tokens=24, page_tokens=16)
    with built(small_config("two layers"), limits) as generator:
        engine, submitted, warm = generator.engine, 0, 0.0
        while submitted < REQUESTS or engine.busy:
            for _ in range(draws.choice([0, 0, 1, 2, 5])):
                if submitted < REQUESTS and engine.waiting < 20:
                    assert engine.submit(*requests[submitted]) == submitted
                    submitted += 1
            if submitted > 20 and draws.random() < 0.03:
                request = draws.randrange(submitted - 20, submitted)
                engine.cancel(request)  # which may have ended, or be waiting still
                given_up.add(request)
            for event in engine.step():
                told[event.request].append(event)
            if submitted >= WARM and not warm:
                warm = resident_mib()
        states = engine.states
        assert (states.owners, states.reserved_pages, states.slots) == ([], 0, [None] * SLOTS)
        grown = resident_mib() - warm
        # Nobody beside it: the same requests all at once, by other sizes of everything.
        generator.close()
        generator.limits = Limits(max_sequences=64, prefill_tokens=999, page_tokens=64)
        again = generator.generate(*map(list, zip(*requests, strict=True)))
    for number, completions in enumerate(again):
        check(told[number], completions, requests[number][1], number in given_up)
    return told, given_up, grown


def check(events, completions, params, given_up) -> None:  # type: ignore[no-untyped-def]
    """Each continuation was told in order, ended once, and is what it is elsewhere."""
    by_continuation = defaultdict(list)
    for event in events:
        by_continuation[event.continuation].append(event)
    assert sorted(by_continuation) == list(range(params.n))
    for index, own in by_continuation.items():
        ends = [event.end for event in own]
        assert ends[:-1] == [None] * (len(own) - 1) and ends[-1] is not None
        tokens = [e.token for e in own if e.token is not None and e.end != "eod"]
        if given_up and ends[-1] == "cancelled":
            assert tokens == completions[index].tokens[: len(tokens)]
        else:
            assert (tokens, ends[-1]) == (completions[index].tokens, completions[index].end)
        assert len(tokens) <= params.max_new_tokens


def test_500_requests_through_8_slots() -> None:
    """Each is answered once with what it is alone, given up or not; memory does not grow."""
    told, given_up, grown = run_distributed(served, 1)[0]
    ends = [event.end for events in told for event in events if event.end]
    assert {"eod", "stop", "length", "cancelled"} == set(ends)
    assert ends.count("cancelled") > 0 and given_up
    assert grown < GROWTH_MIB


def refused() -> list[str]:
    """On a rank: what is said to requests that could never be answered."""
    messages = []
    limits = Limits(max_sequences=2, max_tokens=64, page_tokens=16)
    with built(small_config("all kinds"), limits) as generator:
        for prompt, new_tokens in (([], 1), ([1, 75, -1], 1), ([1] * 60, 5), ([], 65)):
            with pytest.raises(UserError) as error:
                generator.generate([prompt], SamplingParams(max_new_tokens=new_tokens))
            messages.append(str(error.value))
        with pytest.raises(UserError, match="prompt 1: the prompt is empty"):
            generator.generate(["1 2", ""], SamplingParams(max_new_tokens=3))
        assert not generator.engine.busy
        [[fits]] = generator.generate([[1] * 60], SamplingParams(max_new_tokens=4))
        assert len(fits.tokens) == 4 or fits.end == "eod"
    return messages


def test_what_could_never_fit_is_refused_by_name() -> None:
    """An empty prompt, tokens that are none, and more tokens than the states hold, at once."""
    empty, strange, long, both = run_distributed(refused, 1)[0]
    assert empty == "the prompt is empty: give at least one character"
    assert strange == "the prompt holds token 75; allowed: 0 to 74"
    assert "a prompt of 60 tokens with max_new_tokens=5 needs room for 65" in long
    assert "max_tokens=64" in long
    assert len(both.splitlines()) == 2
