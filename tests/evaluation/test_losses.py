"""Losses of tokens: those of one rank's forward pass, however ranks and batches divide them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from megatron_hybrid import cli
from megatron_hybrid.evaluation.windows import NOWHERE, counted_into, padded, rows_of
from megatron_hybrid.generation import Limits, SamplingParams
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import LAYOUTS, MOE, VOCAB_SIZE, layout_config, sample, save_weights
from tests.distributed.layouts import ONE_RANK as ALONE
from tests.generation.models import of_config
from tests.training.runs import GLOBAL_BATCH_SIZE, SEQ_LENGTH, records
from tests.training.runs import words as run_words

LAYOUT = {layout.name: layout for layout in (ALONE, *LAYOUTS)}
# Every way of dividing, in as few starts.
DIVIDED = ("TP2xPP2", "CP2xEP2", "DP2")
LENGTHS = (40, 2, 65, 1, 33)


def losses_of(name: str, weights: Path) -> tuple[list[list[float]], list[list[float]]]:
    """On a rank: the loss of each token of sequences, and the sums by source of their windows."""
    from megatron_hybrid.evaluation.losses import TokenLosses
    from megatron_hybrid.training.checkpoint import load_checkpoint

    config = layout_config(LAYOUT[name], MOE, packed=False, recompute=False)
    draws = torch.Generator().manual_seed(5)
    texts = [torch.randint(VOCAB_SIZE, (n,), generator=draws).tolist() for n in LENGTHS]
    limits = Limits(max_sequences=2, max_tokens=200, page_tokens=16)
    with of_config(config, limits) as generator:
        load_checkpoint(config, weights, generator.chunks, None, weights_only=True)
        losses = TokenLosses(config, generator.chunks, "torch", rows=2)
        rows = [row for i, text in enumerate(texts) for row in rows_of(text, 16, 4 * (i % 2), i)]
        found, sums = losses.of(texts), losses.sums(iter(rows), len(texts)).tolist()
        if name == ALONE.name:
            asked = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
            for text, own in zip(texts, found, strict=True):
                [[told]] = generator.generate([text], asked)
                want = [-each.logprob for each in told.prompt_logprobs or () if each]
                assert own == pytest.approx(want, abs=1e-5)
                assert len(own) == len(text) - 1
            begin = texts[2][:17]
            [alone] = losses.of([begin])
            [[total, count]] = losses.sums(iter(rows_of(begin, 16, 0, 0)), 1).tolist()
            assert (total, count) == (pytest.approx(sum(alone), rel=1e-6), 16)
    return found, sums


def test_layouts_and_batches_give_one_rank_s_losses(tmp_path: Path) -> None:
    """Token by token and summed by source; one rank's are the engine's log-probabilities."""
    run_distributed(save_weights, 1, MOE, tmp_path)
    [(alone, sums)] = run_distributed(losses_of, 1, ALONE.name, tmp_path)
    assert [count for _, count in sums] == [n - 1 for n in LENGTHS]
    for name in DIVIDED:
        for found, divided in run_distributed(losses_of, LAYOUT[name].ranks, name, tmp_path):
            for got, want in zip((*found, *divided), (*alone, *sums), strict=True):
                assert got == pytest.approx(want, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("length", [0, 1, 2, 5, 6, 7, 10, 11, 12, 33])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_every_token_but_the_first_is_counted_once(length: int, overlap: int) -> None:
    """By its own number, whatever the windows; what is before it in its window is what was."""
    tokens = np.arange(100, 100 + length)
    counted = []
    for row in rows_of(tokens, 5, overlap, range(1, max(1, length))):
        assert len(row) <= 5 and row.tokens.tolist() == list(
            range(row.tokens[0], row.tokens[-1] + 1)
        )
        labels = row.tokens[1:][row.counted_from :]
        assert (labels - 100).tolist() == row.into.tolist()
        assert row.into[0] == 1 or row.counted_from == min(overlap, row.into[0] - 1)
        counted += row.into.tolist()
    assert counted == list(range(1, length))


def test_what_fills_a_batch_up_is_counted_nowhere() -> None:
    """Short rows, missing ones, and what a mask leaves out; each label goes where its row says."""
    rows = [*rows_of([7, 8, 9, 7, 8], 3, 2, 6)]
    batch = padded(rows, 3, 4)
    assert batch.tokens.tolist() == [[7, 8, 9, 7], [8, 9, 7, 8], [0] * 4]
    assert batch.labels[1].tolist() == [9, 7, 8, 0]
    assert batch.extra["into"].tolist() == [[6, 6, 6, -1], [-1, -1, 6, -1], [-1] * 4]
    packed = sample(3, packed=True)
    into = counted_into(packed, [4]).extra["into"]
    assert into.shape == packed.labels.shape
    assert set(into[packed.loss_mask == 0].tolist()) == {NOWHERE}
    assert set(into[packed.loss_mask == 1].tolist()) == {4}
    assert math.prod(into.shape) > int((into == 4).sum())


def own_losses(line: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """On a rank: a run to its end, then evaluations of what it evaluates itself on."""
    from megatron_hybrid.evaluation.run import Asked, evaluate, open_evaluation
    from tests.training.runs import outcomes

    ended = outcomes([line])
    assert ended == ["finished"], ended
    torch.distributed.destroy_process_group()  # an evaluation makes its own
    found = []
    for rows in (8, 5):  # 8 samples, with and without some to fill up
        opened = open_evaluation(run_dir, Asked(batch_size=rows), [], world_size=1)
        found.append(evaluate(opened, ranks=1, told=lambda tokens: None))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_s_own_data_have_the_loss_that_it_found(tmp_path: Path, packed: bool) -> None:
    """Of the same samples, by source, with the labels that packing leaves out left out."""
    for number, name in enumerate("ab"):
        texts = np.random.default_rng(number).integers(0, VOCAB_SIZE - 1, (30, 40))
        lines = (json.dumps({"text": " ".join(map(str, text))}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        words = f"data tokenize --input {tmp_path}/{name}.jsonl --output {tmp_path}/{name}"
        null = f"--tokenizer-type null --vocab-size {VOCAB_SIZE} --workers 1"
        done = CliRunner().invoke(cli.app, [*words.split(), *null.split()])
        assert done.exit_code == 0, done.output
    run_dir = tmp_path / "run"
    line = run_words(
        run_dir, "data.mock_data=false",
        f"data.data_path=[[0.7,{tmp_path}/a],[0.3,{tmp_path}/b]]",
        "data.split=6,4,0", f"data.packed_documents={str(packed).lower()}",
        "training.eval_interval=4", "training.eval_iters=2", f"model.vocab_size={VOCAB_SIZE}",
    )  # fmt: skip
    [found] = run_distributed(own_losses, 1, line, run_dir)
    [own] = records(run_dir, "validation")
    for record in found:
        assert record["total"]["loss"] == pytest.approx(own["loss"], rel=1e-6)
        a, b = record["sources"].values()
        assert a["tokens"] > b["tokens"] > 0 and a["loss"] != b["loss"]
        assert a["tokens"] + b["tokens"] == record["total"]["tokens"]
    assert found[0]["total"] == pytest.approx(found[1]["total"], rel=1e-6)
    whole = 2 * GLOBAL_BATCH_SIZE * SEQ_LENGTH
    assert (found[0]["total"]["tokens"] < whole) if packed else (record["total"]["tokens"] == whole)
