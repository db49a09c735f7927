"""Tokens and log-probabilities: of a batch as of each alone, and as in a forward of training."""

from dataclasses import replace

import pytest
import torch

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Completion, Generator, Limits, SamplingParams
from megatron_hybrid.testing import run_distributed
from tests.generation.models import MODELS, VOCAB_SIZE, built, small_config

# A rank computes in batches of many sizes, whose products differ in their last bits: where the two
# likeliest tokens are closer than this, either may be drawn. The models are drawn so that none is.
LEAST_MARGIN = 2e-5


def ragged_requests(count: int = 33) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 60 tokens, greedy and sampled in every way, of different lengths."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 61, (count,), generator=draws).tolist()
    prompts = [torch.randint(VOCAB_SIZE, (n,), generator=draws).tolist() for n in lengths]
    ways = [
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "min_p": 0.05, "n": 3},
        {"repetition_penalty": 1.3}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9},
    ]  # fmt: skip
    params = [
        SamplingParams(
            max_new_tokens=2 + 4 * (i % 4), seed=i, logprobs=2, prompt_logprobs=i % 3 == 0,
            **ways[i % len(ways)],
        )
        for i in range(count)
    ]  # fmt: skip
    return prompts, params


def generated(names: list[str], limits: list[Limits]) -> list[list[list[list[Completion]]]]:
    """On a rank: what each model makes of the requests, at once by each of the limits."""
    prompts, params = ragged_requests()
    found = []
    for name in names:
        found.append([])
        for sizes in limits:
            with built(small_config(name), sizes) as generator:
                found[-1].append(generator.generate(prompts, params))
                states = generator.engine.states
                metas = -(-states.num_meta_tokens // sizes.page_tokens)
                assert (len(states.owners), states.reserved_pages) == (metas, metas)
                assert states.slots[: sizes.max_sequences] == [None] * sizes.max_sequences
                if sizes is limits[0]:
                    check_forward(generator, prompts[:7], params, found[-1][-1])
    return found


def check_forward(
    generator: Generator,
    prompts: list[list[int]],
    params: list[SamplingParams],
    found: list[list[Completion]],
) -> None:
    """Log-probabilities of prompts, of drawn tokens and of the likeliest are the module's own."""
    for prompt, own, completions in zip(prompts, params, found, strict=False):
        for completion in completions:
            text = torch.tensor([[*prompt, *completion.tokens]])
            logprobs = generator.logits(text)[0, :, :VOCAB_SIZE].log_softmax(-1)
            after = logprobs[len(prompt) - 1 : -1]
            assert completion.logprobs is not None
            want = after.gather(1, text[0, len(prompt) :, None]).squeeze(1)
            got = torch.tensor([each.logprob for each in completion.logprobs])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            best = torch.tensor([[p for _, p in each.top] for each in completion.logprobs])
            torch.testing.assert_close(best.view(-1, 2), after.topk(2).values, atol=1e-5, rtol=1e-5)
        if own.prompt_logprobs:
            told = completions[0].prompt_logprobs
            assert told is not None and len(told) == len(prompt) and told[0] is None
            want = logprobs[: len(prompt) - 1].gather(1, text[0, 1 : len(prompt), None]).squeeze(1)
            got = torch.tensor([each.logprob for each in told[1:] if each is not None])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_batch_has_the_tokens_of_each_alone() -> None:
    """33 ragged requests by many slots, chunks of any size, pages of few tokens; each alone."""
    batched = Limits(max_sequences=9, max_tokens=900, prefill_tokens=41, page_tokens=8)
    names = [name for name in MODELS if name != "two layers"]
    alone = Limits(max_sequences=1, max_tokens=96, prefill_tokens=64, page_tokens=96)
    (found,) = run_distributed(generated, 1, names, [batched, alone])
    for name, (many, single) in zip(names, found, strict=True):
        ends = set()
        for completions in zip(many, single, strict=True):
            tokens = [[c.tokens for c in each] for each in completions]
            assert tokens[0] == tokens[1], name
            for completion in completions[1]:
                ends.add(completion.end)
                for told in completion.logprobs or ():
                    (_, first), (_, second) = told.top
                    assert first - second > LEAST_MARGIN, f"{name}: another seed, please"
        assert ends == {"length", "eod"}, f"{name}: {ends}"


def chunked(sizes: list[int]) -> float:
    """On a rank: the largest difference of a prompt's log-probabilities by size of chunk."""
    prompt = torch.randint(VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    asked = SamplingParams(max_new_tokens=0, prompt_logprobs=True, logprobs=VOCAB_SIZE)
    worst = 0.0
    with built(small_config("all kinds")) as generator:
        want = generator.logits(torch.tensor([prompt]))[0, :-1, :VOCAB_SIZE].log_softmax(-1)
        for size in sizes:
            generator.close()
            generator.limits = Limits(max_sequences=2, prefill_tokens=size, page_tokens=16)
            [[completion]] = generator.generate([prompt], asked)
            assert (completion.tokens, completion.end) == ([], "length")
            assert completion.prompt_logprobs is not None
            for row, told in zip(want, completion.prompt_logprobs[1:], strict=True):
                assert told is not None
                ids = torch.tensor([token for token, _ in told.top])
                values = torch.tensor([value for _, value in told.top])
                worst = max(worst, (row[ids] - values).abs().max().item())
    return worst


def test_chunks_of_any_size_have_the_full_forward() -> None:
    """All log-probabilities at all places, by chunks of a token to chunks of the whole: 1e-5."""
    assert run_distributed(chunked, 1, [1, 2, 3, 64, 65, 149, 150])[0] <= 1e-5


def scored(name: str, sizes: list[Limits]) -> float:
    """On a rank: the largest error of what is told of continuations that are there."""
    draws = torch.Generator().manual_seed(4)

    def text(length: int) -> list[int]:
        return torch.randint(VOCAB_SIZE, (length,), generator=draws).tolist()

    requests = [
        (text(25), [text(n) for n in (1, 9, 1, 3, 12, 1, 2)]), (text(1), [text(1), text(4)]),
        (text(40), [text(20)]), (text(8), [text(1)]),
    ]  # fmt: skip
    worst = 0.0
    for limits in sizes:
        with built(small_config(name), limits) as generator:
            count = 0

            def told() -> None:
                nonlocal count
                count += 1

            found = generator.score(requests, top=2, told=told)
            assert count == sum(len(given) for _, given in requests)
            states = generator.engine.states
            assert (states.owners, states.reserved_pages) == ([], 0)
            for (prompt, given), each in zip(requests, found, strict=True):
                for tokens, got in zip(given, each, strict=True):
                    logits = generator.logits(torch.tensor([[*prompt, *tokens]]))
                    after = logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE].log_softmax(-1)
                    want = after.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
                    have = torch.tensor([one.logprob for one in got])
                    tops = torch.tensor([[value for _, value in one.top] for one in got])
                    worst = max(worst, (want - have).abs().max().item())
                    worst = max(worst, (after.topk(2).values - tops).abs().max().item())
            with pytest.raises(UserError, match="request 1: a continuation is empty"):
                generator.score([([1], [[2]]), ([1], [[2], []])])
            with pytest.raises(UserError, match=f"continuation holds token {VOCAB_SIZE}; allowed"):
                generator.score([([1], [[VOCAB_SIZE], [2, 3]])])  # not the longest
            assert generator.score([([1], [[2]])])[0][0]
    return worst


@pytest.mark.parametrize("name", ["all kinds", "window"])
def test_continuations_that_are_there_share_their_prompt(name: str) -> None:
    """By slots for all of them or for one at a time, in chunks that cut prompt and continuation:
    as in the forward of each whole text."""
    sizes = [Limits(9, 900, 41, 8), Limits(3, 300, 7, 8), Limits(1, 64, 64, 64)]
    assert run_distributed(scored, 1, name, sizes)[0] <= 1e-5


def every_expert() -> list[tuple[float, float]]:
    """On a rank: how far experts that take all tokens are from those that take their own."""
    distances = []
    for name in ("all kinds", "expert bias, packed", "softmax first"):
        with built(small_config(name)) as generator, torch.no_grad():
            from megatron_hybrid.generation.layers.moe import MoeLayer  # which imports the engine

            stages = generator.engine.decoder.stages
            (layer, *_) = [each for each in stages[0] if isinstance(each, MoeLayer)]
            for tokens in (1, 9):
                hidden = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(tokens))
                normed = layer.norm(hidden)
                own, of_all = (
                    layer.chosen(normed, *layer.route(normed)),
                    layer.all_tokens(normed, *layer.route(normed)),
                )
                distances.append(((own - of_all).abs().max().item(), own.std().item()))
    return distances


def test_experts_take_their_own_tokens_or_all() -> None:
    """Without asking the device which tokens are whose, as on GPUs, the sum is the same."""
    for distance, deviation in run_distributed(every_expert, 1)[0]:
        assert distance <= 1e-5 * deviation


def trained_in_between() -> tuple[list[int], list[int], list[int]]:
    """On a rank: tokens before the weights change, after it, and of a new generator."""
    params = SamplingParams(max_new_tokens=12, ignore_eod=True)
    with built(small_config("all kinds")) as generator:
        first = generator.generate([[5, 6]], params)[0][0].tokens
        pointers = [p.data_ptr() for p in generator.chunks[0].parameters()]
        with torch.no_grad():
            for parameter in generator.chunks[0].parameters():
                parameter.mul_(-0.9)
        second = generator.generate([[5, 6]], params)[0][0].tokens
        anew = Generator.of_model(generator.config, generator.chunks, generator.tokenizer)
        third = anew.generate([[5, 6]], replace(params, n=2))[0][0].tokens
        assert pointers == [p.data_ptr() for p in generator.chunks[0].parameters()]
    return first, second, third


def test_a_model_in_training_shares_its_weights() -> None:
    """What the next request sees is what the last step of training left; nothing was copied."""
    first, second, third = run_distributed(trained_in_between, 1)[0]
    assert first != second == third
