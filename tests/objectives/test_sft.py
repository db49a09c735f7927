"""Supervised fine-tuning: packed as alone, in any layout as on one rank, from another's weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.config import load_config
from megatron_hybrid.objectives.registry import objective_problems
from megatron_hybrid.testing import run_distributed
from tests.data.conftest import write_conversations
from tests.training.runs import (
    MOE,
    SEQ_LENGTH,
    VOCAB_SIZE,
    losses,
    outcomes,
    records,
    same_tensors,
    tensors_of_all,
    trainer,
    words,
)

SFT = [
    "training.objective=sft", "data.packed_documents=true", "data.mock_data=false",
    "data.split=80,20,0", "checkpoint.finetune=true",
    # As in tests/distributed: Adam's first steps are signs unless eps is large.
    "optimizer.adam_eps=1e-2",
]  # fmt: skip
LAYOUTS = {
    "tp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pp": ["parallel.pipeline_model_parallel_size=2", "model.hybrid_layer_pattern=M*|E-"],
    "cp": ["parallel.context_parallel_size=2"],
    "ep": ["parallel.expert_model_parallel_size=2"],
}


def corpus(prefix: Path, seed: int) -> str:
    """Conversations of a few turns; some are longer than a row."""
    draws, found = np.random.default_rng(seed), []
    for _ in range(60):
        length = int(draws.integers(4, SEQ_LENGTH + 8))
        ids = draws.integers(0, VOCAB_SIZE, size=length).tolist()
        turn = int(draws.integers(2, 6))
        found.append((ids, [place // turn % 2 == 1 for place in range(length)]))
    return write_conversations(prefix, found, VOCAB_SIZE)


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources, of which the second comes later."""
    folder = tmp_path_factory.mktemp("chats")
    one, two = corpus(folder / "one", 1), corpus(folder / "two", 2)
    return [
        f"data.sources={{one: {{path: {one}}}, two: {{path: {two}}}}}",
        "data.phases=[{name: a, weights: {one: 1}},"
        " {name: b, start_fraction: 0.5, weights: {one: 1, two: 2}}]",
    ]


def alone(line: list[str]) -> tuple[float, float, int]:
    """On a rank: the loss on the held-out conversations, each by itself, before any step; and how
    many tokens it is a mean of."""
    from megatron_hybrid.data.datasets import open_windows

    with trainer(line) as run:
        _, valid = open_windows(run.config, run.tokenizer, run.data)
        assert valid is not None
        total, count = 0.0, 0
        indices = range(len(valid))
        rows = zip(
            valid.__getitems__(indices), valid.document_ends(indices), valid.learnt(indices),
            strict=True,
        )  # fmt: skip
        for window, ends, learnt in rows:
            begin = 0
            for end in np.flatnonzero(ends).tolist():
                ids = torch.from_numpy(window[begin : end + 1])[None]
                mask = torch.from_numpy(learnt[begin + 1 : end + 1])
                with torch.no_grad():
                    logits = run.model[0](ids, torch.arange(ids.shape[1])[None], None)[0, :-1]
                each = F.cross_entropy(logits, ids[0, 1:], reduction="none")
                total, count = total + float(each[mask].sum()), count + int(mask.sum())
                begin = end + 1
        run.run()
    return total / count, count, len(valid)


def all_runs(lines: list[list[str]], evaluated: list[str], folders: list[Path]) -> Any:
    """On a rank: how runs end, `alone` of one more, and the tensors of checkpoints."""
    return outcomes(lines), alone(evaluated), tensors_of_all(folders)


def test_runs(blend: list[str], tmp_path: Path) -> None:
    """From a checkpoint of pre-training, with a schedule of its own: the loss is that of each
    conversation by itself; micro batches divide it; to the bit the same when it is resumed; and on
    two ranks, in each of four layouts, what one rank computes."""
    base = tmp_path / "base"
    load = f"checkpoint.load={base}/checkpoints"
    names = ("whole", "resumed", "micro", "evaluated", *LAYOUTS)
    whole, resumed, micro, evaluated, *layouts = (tmp_path / name for name in names)
    line = [*MOE, *blend, *SFT, load]
    still = ["optimizer.lr=1e-30", "training.eval_interval=4", "training.eval_iters=1"]
    found, (loss, count, _), (one, other) = run_distributed(
        all_runs,
        1,
        [
            words(base, *MOE, "training.train_iters=2"),
            words(whole, *line),
            words(resumed, *line, "training.exit_interval=2"),
            words(resumed, *line),
            words(micro, *line, "training.micro_batch_size=1"),
        ],
        words(evaluated, *line, *still),
        [each / "checkpoints" / "iter_0000004" for each in (whole, resumed)],
    )[0]
    assert found == ["finished", "finished", "exit_interval", "finished", "finished"]
    [logged] = records(evaluated, "validation")
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["extra"]["learnt_tokens"] == count
    assert losses(resumed) == losses(whole)
    assert same_tensors(one, other)
    assert losses(micro) == pytest.approx(losses(whole), rel=1e-5)
    assert [record["iteration"] for record in records(whole)] == [1, 2, 3, 4]
    ends = run_distributed(
        outcomes, 2,
        [words(folder, *line, *LAYOUTS[folder.name]) for folder in layouts],
    )  # fmt: skip
    assert ends == [["finished"] * len(LAYOUTS)] * 2
    for folder in layouts:
        for name in ("loss", "grad_norm"):
            expected = [record[name] for record in records(whole)]
            figures = [record[name] for record in records(folder)]
            assert figures == pytest.approx(expected, rel=1e-5), (folder.name, name)


def test_plan(blend: list[str], tmp_path: Path) -> None:
    """`data plan` plans rows, of whole ones, as the run reads them; and says what a run would."""
    line = words(tmp_path, *[word for word in SFT if "finetune" not in word], *blend)
    found = CliRunner().invoke(app, ["data", "plan", *line, "--json"])
    assert found.exit_code == 0, found.output
    planned = json.loads(found.stdout)
    assert planned["steps"] == 4
    for source in planned["sources"]:
        assert source["epoch_tokens"] % SEQ_LENGTH == source["held_out"] % SEQ_LENGTH == 0
        assert source["tokens"] == source["held_out"] + source["epoch_tokens"] + 1
    refused = CliRunner().invoke(app, ["data", "plan", *line, "data.packed_documents=false"])
    assert "data.packed_documents must be true" in str(refused.exception)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (["data.mock_data=true"], "data.mock_data must be false"),
        (["data.packed_documents=false"], "data.packed_documents must be true"),
        (["data.block_tokens=64"], "data.block_tokens=64 must be null"),
        (["data.sample_order=megatron"], "needs data.sample_order=plan; it is megatron"),
        (["model.attn_mask_type=no_mask", "model.hybrid_layer_pattern=*-"],
         "needs model.attn_mask_type=causal; it is no_mask"),
    ],
)  # fmt: skip
def test_what_is_refused(change: list[str], problem: str, tmp_path: Path) -> None:
    """Samples that are no rows, and layers that see across conversations."""
    line = [*SFT[:-2], "data.data_path=chat", *change]
    config = load_config(words(tmp_path, *line), which=())
    [found] = objective_problems(config)
    assert found.startswith("training.objective=sft ") and found.endswith(problem)


def test_one_length(tmp_path: Path) -> None:
    """Phases cannot have rows of their own."""
    phases = "[{name: a, weights: {chat: 1}, seq_length: 64}]"
    sources = "{chat: {path: chat}}"
    line = words(tmp_path, *SFT[:-2], f"data.sources={sources}", f"data.phases={phases}")
    [found] = objective_problems(load_config(line, which=()))
    assert found.endswith("data.phases[0].seq_length=64 must be null or data.seq_length=32")
