"""Training and generating in turns: neither notices the other, but for the weights."""

from pathlib import Path

import pytest
import torch

from megatron_hybrid.generation import Generator, Limits, SamplingParams
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    MOE,
    SEQ_LENGTH,
    VOCAB_SIZE,
    Layout,
    batches_of_this_rank,
    built,
    layout_config,
    save_weights,
)
from tests.distributed.layouts import ONE_RANK as ALONE

OVERLAPPED = next(layout for layout in LAYOUTS if layout.overlap)


def in_turns(
    layout: Layout, weights: Path, generates: bool = True
) -> tuple[list[float], list[list[int]]]:
    """On a rank: losses of steps, and the tokens between them; none on the ranks that follow."""
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.step import BatchShape

    config = layout_config(layout, MOE, packed=False, recompute=False)
    asked = SamplingParams(max_new_tokens=8, ignore_eod=True)
    losses, tokens = [], []
    with built(config) as (model, optimizer, stepper):
        load_checkpoint(config, weights, model, optimizer, weights_only=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.02  # so that a step shows
        data, shape = batches_of_this_rank(False), BatchShape(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
        for _ in range(3):
            losses.append(stepper.train(data, shape, float("inf"), []).loss)
            if not generates:
                continue
            generator = Generator.of_model(
                config, model, NullTokenizer(VOCAB_SIZE), limits=Limits(2, 64)
            )
            if torch.distributed.get_rank():
                generator.follow()
            else:
                tokens.append(generator.generate([[3, 1, 4]], asked)[0][0].tokens)
                generator.close()
    return losses, tokens


def test_training_and_generating_in_turns(tmp_path: Path) -> None:
    """Ranks that gather parameters late generate from the whole of the last step; the losses are
    those of a run that never generates."""
    run_distributed(save_weights, 1, MOE, tmp_path)
    (alone,) = run_distributed(in_turns, 1, ALONE, tmp_path)
    (never,) = run_distributed(in_turns, 1, ALONE, tmp_path, generates=False)
    assert alone[0] == never[0]
    first, second = run_distributed(in_turns, 2, OVERLAPPED, tmp_path)
    assert first[0] == pytest.approx(alone[0], rel=1e-5) and second[0] == first[0]
    assert first[1] == alone[1] and second[1] == []
    assert len({tuple(each) for each in alone[1]}) == 3, "steps too small to show"
