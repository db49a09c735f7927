"""Masked diffusion: what is masked, the loss by hand, and what cannot be trained so.

That every layout agrees with one rank: tests/distributed/test_layouts.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_hybrid.config import load_config
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.objectives.masked_diffusion import draw_masks
from megatron_hybrid.objectives.registry import objective_problems
from megatron_hybrid.testing import run_distributed
from tests.training.runs import (
    GLOBAL_BATCH_SIZE,
    SEQ_LENGTH,
    VOCAB_SIZE,
    losses,
    outcomes,
    records,
    trainer,
    words,
)

MASK = VOCAB_SIZE - 1
DIFFUSION = [
    "model.hybrid_layer_pattern=*-", "model.attn_mask_type=no_mask",
    "training.objective=masked_diffusion", f"training.objective_options.mask_token_id={MASK}",
]  # fmt: skip


def test_draws() -> None:
    """Ratios are uniform, tokens of a sample masked at its ratio, each by the sample's number and
    the seed alone."""
    ratios, masked = draw_masks(7, range(2000), 400, 0.25)
    assert ratios.min() >= 0.25 and ratios.max() <= 1
    counts, _ = np.histogram(ratios, bins=10, range=(0.25, 1))
    assert np.abs(counts - 200).max() < 60  # over 4 standard deviations
    deviations = (masked.mean(1) - ratios) / np.sqrt(ratios * (1 - ratios) / 400)
    assert deviations.mean() == pytest.approx(0, abs=0.1)
    assert deviations.std() == pytest.approx(1, abs=0.1)
    places = masked.mean(0)
    assert np.abs(places - places.mean()).max() < 0.05
    again, same = draw_masks(7, [1234, 5], 400, 0.25)
    assert (again == ratios[[1234, 5]]).all() and (same == masked[[1234, 5]]).all()
    assert (draw_masks(8, [5], 400, 0.25)[1] != masked[5]).any()


def end_token(token: int) -> tuple[torch.Tensor, torch.Tensor, None]:
    """What a model takes: a text that ends with a token."""
    tokens = torch.zeros(1, SEQ_LENGTH, dtype=torch.int64)
    tokens[0, -1] = token
    return tokens, torch.arange(SEQ_LENGTH)[None], None


def by_hand(line: list[str]) -> tuple[float, float]:
    """On a rank: the loss on the held-out samples, weighted and not, by the definition.

    The first token of a text sees the last."""
    from megatron_hybrid.data.datasets import open_windows

    with trainer(line) as run:
        run.run()
        _, valid = open_windows(run.config, run.tokenizer, run.data)
        assert valid is not None
        assert run.model[0](*end_token(1))[0, 0].ne(run.model[0](*end_token(2))[0, 0]).any()
        total, plain, count = 0.0, 0.0, 0
        ratios, masked = draw_masks(
            run.config.training.seed, range(GLOBAL_BATCH_SIZE), SEQ_LENGTH, 1e-3
        )
        for number, (ratio, where) in enumerate(zip(ratios, masked, strict=True)):
            tokens = torch.from_numpy(valid.__getitems__([number]))[:, :-1]
            corrupted = tokens.masked_fill(torch.from_numpy(where), MASK)
            with torch.no_grad():
                logits = run.model[0](corrupted, torch.arange(SEQ_LENGTH)[None], None)[0]
            each = F.cross_entropy(logits, tokens[0], reduction="none")[torch.from_numpy(where)]
            total, plain = total + float(each.sum() / ratio), plain + float(each.sum())
            count += len(each)
        return total / (GLOBAL_BATCH_SIZE * SEQ_LENGTH), plain / count


def all_runs(lines: list[list[str]], evaluated: list[str]) -> tuple[list[str], tuple[float, float]]:
    """On a rank: how several runs end, and `by_hand` of one more."""
    return outcomes(lines), by_hand(evaluated)


def test_training(tmp_path: Path) -> None:
    """The loss is the definition's; micro batches divide it, packed or not; a resumed run is the
    same to the bit; and what comes of it does not write from left to right."""
    from megatron_hybrid.generation import Generator

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    packed = [tmp_path / name for name in ("packed1", "packed2")]
    found, expected = run_distributed(
        all_runs,
        1,
        [
            words(resumed, *DIFFUSION, "training.exit_interval=2"),
            words(resumed, *DIFFUSION),
            *(
                words(folder, *DIFFUSION, "data.packed_documents=true", f"{name}={size}")
                for folder, size in zip(packed, (1, 2), strict=True)
                for name in ["training.micro_batch_size"]
            ),
        ],
        words(whole, *DIFFUSION, "training.eval_interval=4", "training.eval_iters=1"),
    )[0]
    assert found == ["exit_interval", "finished", "finished", "finished"]
    [logged] = records(whole, "validation")
    assert (logged["loss"], logged["extra"]["masked_loss"]) == pytest.approx(expected, rel=1e-6)
    assert losses(resumed) == losses(whole)
    assert losses(packed[1]) == pytest.approx(losses(packed[0]), rel=1e-6)
    assert losses(packed[0]) != losses(whole)
    with (
        pytest.raises(UserError, match=r"model\.attn_mask_type=no_mask"),
        Generator(whole / "checkpoints"),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["model.attn_mask_type=causal"], "training.objective=masked_diffusion needs "
         "model.attn_mask_type=no_mask, so that a token sees those on both sides; it is causal"),
        (["model.attn_mask_type=causal", "model.hybrid_layer_pattern=M*-"],
         "training.objective=masked_diffusion needs a pattern without 'M' layers, which "
         "read from left to right; model.hybrid_layer_pattern='M*-'; "
         "allowed: '*', '-', 'E'"),
        (["training.objective_options.mask_token_id=64"],
         "training.objective_options.mask_token_id=64 must be an id of the vocabulary; allowed: 0 "
         "to 63"),
        (["training.objective_options={mask_token_id: 1, least_ratio: 1}"],
         "training.objective_options.least_ratio=1 must be a number above 0 and below 1"),
        (["training.objective=pretraining", "training.objective_options={}"],
         "training.objective=pretraining needs model.attn_mask_type=causal; it is no_mask"),
    ],
)  # fmt: skip
def test_what_is_refused(change: list[str], problem: str, tmp_path: Path) -> None:
    """A pattern with Mamba-2, causal attention, a mask that is no token; or no causal attention."""
    config = load_config(words(tmp_path, *DIFFUSION, *change))
    assert objective_problems(config) == [problem]


def test_mamba_is_refused_by_name(tmp_path: Path) -> None:
    """Also where attention is asked to have no mask."""
    with pytest.raises(ConfigError, match="which read from left to right"):
        load_config(words(tmp_path, *DIFFUSION, "model.hybrid_layer_pattern=M*-"))
