"""Ranks of every kind of model parallelism give the tokens that one rank gives."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.generation import Completion, Limits, SamplingParams
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    HEADS,
    HYMBA,
    LAYOUTS,
    MOE,
    UNLIKE,
    VOCAB_SIZE,
    layout_config,
    save_weights,
)
from tests.distributed.layouts import ONE_RANK as ALONE
from tests.generation.models import of_config

LAYOUT = {layout.name: layout for layout in (ALONE, *LAYOUTS)}
MODEL_PARALLEL = {
    MOE: ("TP2+SP", "PP2", "PP2xVPP2", "EP2", "PP2xEP2"), UNLIKE: ("TP2xPP2", "EP2"),
    HEADS: ("TP2xPP2",), HYMBA: ("TP2xPP2",),
}  # fmt: skip


def generated(
    name: str, layers: str, weights: Path
) -> list[tuple[list[int], str, list[float]]] | None:
    """On a rank: tokens, ends and log-probabilities by a layout; None on the ranks that follow."""
    from megatron_hybrid.training.checkpoint import load_checkpoint

    config = layout_config(LAYOUT[name], layers, packed=False, recompute=False)
    draws = torch.Generator().manual_seed(5)
    prompts = [torch.randint(VOCAB_SIZE, (n,), generator=draws).tolist() for n in (3, 40, 1, 17)]
    params = [
        SamplingParams(max_new_tokens=6 + i, temperature=i % 2, n=1 + i // 2, logprobs=1, seed=i)
        for i in range(4)
    ]
    limits = Limits(max_sequences=3, max_tokens=200, prefill_tokens=16, page_tokens=16)
    with of_config(config, limits) as generator:
        load_checkpoint(config, weights, generator.chunks, None, weights_only=True)
        if torch.distributed.get_rank():
            generator.engine.follow()
            return None
        found = generator.generate(prompts, params)
        given = generator.score([(prompts[1], [[1, 2, 3], [4]])])
        generator.close()

    def told(each: Completion) -> tuple[list[int], str, list[float]]:
        return each.tokens, each.end, [one.logprob for one in each.logprobs or ()]

    scores = [([], "given", [one.logprob for one in each]) for each in given[0]]
    return [*(told(each) for completions in found for each in completions), *scores]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layers: tmp_path_factory.mktemp("weights") for layers in MODEL_PARALLEL}
    for layers, folder in folders.items():
        run_distributed(save_weights, 1, layers, folder)
    return folders


@pytest.mark.parametrize("layers", MODEL_PARALLEL, ids=["alike", "unlike", "heads", "hymba"])
def test_ranks_give_the_tokens_of_one(layers: str, weights: dict[str, Path]) -> None:
    """All layer kinds under TP, PP with virtual stages, EP and pairs of them: tokens,
    greedy and sampled, ends, and log-probabilities to 1e-5; the others end with the first."""
    (alone,) = run_distributed(generated, 1, "one rank", layers, weights[layers])
    assert alone is not None and sum(len(tokens) for tokens, _, _ in alone) > 30
    for name in MODEL_PARALLEL[layers]:
        ranks = LAYOUT[name].ranks
        first, *others = run_distributed(generated, ranks, name, layers, weights[layers])
        assert others == [None] * len(others)
        assert [each[:2] for each in first] == [each[:2] for each in alone], name
        for got, want in zip(first, alone, strict=True):
            assert got[2] == pytest.approx(want[2], abs=1e-5), name
