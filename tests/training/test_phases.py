"""Runs over phases: which samples they read, and how they go on after a stop or an edit."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_hybrid.config import load_config
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.datasets import open_windows, plan_data
from megatron_hybrid.data.saved_plan import read_saved_plan
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.testing import run_distributed
from tests.training.phased import PHASES, STEPS, TRAIN_TOKENS, corpora, corpus, phased_words
from tests.training.runs import VOCAB_SIZE, losses, outcomes, records, trainer

PLAN = "data_plan.json"


class Step(NamedTuple):
    """A global batch: its first sample, its size and length, and the rows that this rank read."""

    first_sample: int
    samples: int
    seq_length: int
    rows: list[bytes]


def recorded(line: list[str]) -> tuple[str, list[Step]]:
    """On a rank: how a run ended, and what it read for each step of training."""
    steps: list[Step] = []
    with trainer(line) as run:
        train = run.stepper.train

        def watched(data: Iterator[Batch], shape: Any, *rest: Any, **named: Any) -> Any:
            step = Step(run.progress.consumed_samples, *shape, rows=[])
            steps.append(step)

            def watched_data() -> Iterator[Batch]:
                for batch in data:
                    tokens = batch.tokens.view(-1, shape.seq_length).numpy()
                    step.rows.extend(row.tobytes() for row in tokens)
                    yield batch

            return train(watched_data(), shape, *rest, **named)

        run.stepper.train = watched
        return run.run(), steps


def numbered(line: list[str]) -> dict[bytes, int]:
    """The number of each sample of a run by its tokens."""
    config = load_config(line)
    tokenizer = build_tokenizer("null", None, vocab_size=VOCAB_SIZE)
    data = plan_data(config, tokenizer, None)
    windows, _ = open_windows(config, tokenizer, data)
    numbers = {
        windows.__getitems__([sample])[0][:-1].tobytes(): sample for sample in range(len(windows))
    }
    assert len(numbers) == len(windows), "no two samples are alike"
    return numbers


def samples_of(ranks: list[Step], numbers: dict[bytes, int]) -> list[int]:
    """The samples that all ranks together read for a step, sorted; each read as many."""
    assert len({step[:3] for step in ranks}) == 1
    assert len({len(step.rows) for step in ranks}) == 1
    return sorted(numbers[row] for step in ranks for row in step.rows)


@pytest.mark.parametrize("packed", ["true", "false"])
def test_resumed_in_another_layout(packed: str, tmp_path: Path) -> None:
    """Stopped within phase 2 and resumed over two ranks with other micro and global batches, a run
    reads, step by step, the samples of one that changed its batch there by schedule; losses agree.
    """
    sources = corpora(tmp_path, "web", "code", "math")
    common = [f"data.packed_documents={packed}", "data.num_workers=1"]
    # From 1536 tokens on, in the middle of the second phase: step 12.
    scheduled = "training.batch_size_schedule=[[1536, 8]]"
    whole = phased_words(tmp_path / "whole", sources, *common, scheduled)
    first = phased_words(tmp_path / "cut", sources, *common)
    other = ["training.global_batch_size=8", "training.micro_batch_size=2"]
    [(ended, expected)] = run_distributed(recorded, 1, whole)
    [(stopped, before)] = run_distributed(recorded, 1, [*first, "training.exit_interval=12"])
    resumed = run_distributed(recorded, 2, [*first, *other])
    assert [ended, stopped] == ["finished", "exit_interval"]
    assert [reason for reason, _ in resumed] == ["finished"] * 2
    after = list(zip(*(steps for _, steps in resumed), strict=True))
    numbers = numbered(whole)
    assert len(before) == 12
    assert [step[:3] for step in expected] == [step[:3] for step in before] + [
        steps[0][:3] for steps in after
    ]
    for wanted, ranks in zip(expected, [[step] for step in before] + list(after), strict=True):
        samples = list(range(wanted.first_sample, wanted.first_sample + wanted.samples))
        assert samples_of([wanted], numbers) == samples_of(list(ranks), numbers) == samples
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert len(losses(tmp_path / "cut")) == 12 + 4 + 2 + 2
    reproducible = ("source_tokens", "source_epochs", "phase", "consumed_tokens", "learning_rate")
    for one, two in zip(records(tmp_path / "cut"), records(tmp_path / "whole"), strict=True):
        assert [one[name] for name in reproducible] == [two[name] for name in reproducible]


def test_what_is_logged_of_sources(tmp_path: Path) -> None:
    """Consumed tokens and epochs grow with each step by what its phase weighs, and add up."""
    sources = corpora(tmp_path, "web", "code", "math")
    assert run_distributed(outcomes, 1, [phased_words(tmp_path / "run", sources)]) == [["finished"]]
    steps = records(tmp_path / "run")
    assert len(steps) == STEPS
    assert [step["phase"] for step in steps] == (
        ["broad"] * 8 + ["code"] * 12 + ["long"] * 4 + ["end"] * 4
    )
    assert steps[-1]["consumed_tokens"] == TRAIN_TOKENS
    for step in steps:
        assert sum(step["source_tokens"].values()) == step["consumed_tokens"]
    assert steps[7]["source_tokens"] == {"web": 16 * 32, "code": 10 * 32, "math": 6 * 32}
    assert steps[19]["source_tokens"]["math"] == 6 * 32
    one_epoch = steps[-1]["source_tokens"]["web"] / steps[-1]["source_epochs"]["web"]
    assert 0.95 * 4800 < one_epoch <= 4800  # 80 % of the source, in whole blocks


def test_no_token_is_read_twice(tmp_path: Path) -> None:
    """Over all phases and both lengths, each token of a source is read once in its first epoch."""
    sources = corpora(tmp_path, "web", "code", "math")
    [(ended, steps)] = run_distributed(recorded, 1, phased_words(tmp_path / "run", sources))
    assert ended == "finished"
    saved = read_saved_plan(tmp_path / "run" / "checkpoints" / f"iter_{STEPS:07d}")
    assert saved is not None and saved.consumed_samples == saved.plan.samples
    assert max(use.epochs for use in saved.plan.consumed(saved.plan.samples)) < 1
    tokens = [np.fromfile(tmp_path / f"{name}.bin", np.uint16) for name in ("web", "code", "math")]
    times_read = [np.zeros(len(each), dtype=int) for each in tokens]
    samples = iter(range(saved.plan.samples))
    for step in steps:
        wanted = []
        for sample in islice(samples, step.samples):
            (source,), (offset,), *_ = saved.plan.locate([sample])
            place = slice(offset, offset + step.seq_length)
            wanted.append(tokens[source][place].astype(np.int64).tobytes())
            times_read[source][place] += 1
        assert sorted(step.rows) == sorted(wanted)
    assert {count for each in times_read for count in np.unique(each)} == {0, 1}


EDITS = {
    "another seed": (["training.seed=7"], "training.seed=7 was 1234"),
    "a weight of the first phase": (
        ["data.phases[0].weights.web=9"], r"data\.phases\[0\]\.weights\.web is 0.64",
    ),
    "where the second phase began": (
        ["data.phases[1].start_tokens=1300"], r"data\.phases\[1\] starts at 1300",
    ),
    "the length of the first phase": (
        ["data.phases[0].seq_length=64"], r"data\.phases\[0\]\.seq_length=64 was 32",
    ),
    "a source's held-out share": (["data.split=90,10,0"], r"data\.sources\.web\.split"),
    "another order": (["data.mock_data=true", "data.sources={}", "data.phases=[]"], "mock_data"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was stopped in its second phase, and its sources."""
    folder = tmp_path_factory.mktemp("stopped")
    sources = corpora(folder, "web", "code", "math")
    line = phased_words(folder / "run", sources, "training.exit_interval=12")
    assert run_distributed(outcomes, 1, [line]) == [["exit_interval"]]
    return folder / "run", sources


def test_edits_of_the_past_are_refused(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """What was read cannot be declared otherwise: each field is named before anything is loaded."""
    run_dir, sources = stopped
    load = f"checkpoint.load={run_dir}/checkpoints"  # whose config is the one that is edited
    lines = [
        phased_words(tmp_path / str(number), sources, load, *edit)
        for number, (edit, _) in enumerate(EDITS.values())
    ]
    found = run_distributed(outcomes, 1, lines)[0]
    for text, (name, (_, pattern)) in zip(found, EDITS.items(), strict=True):
        assert text.startswith(("DataError: ", "UserError: ")), (name, text)
        assert re.search(pattern, text), (name, text)


def test_later_phases_may_change(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """From a phase that has not begun on there may be another source and a longer run; those that
    were read go on where they stood."""
    run_dir, sources = stopped
    more = sources[:-1] + f", {corpora(tmp_path, 'books')[1:-1]}}}"
    phases = PHASES.replace("name: long, start_tokens: 2600, weights: {", "name: long, "
                            "start_tokens: 2600, weights: {books: 3, ")  # fmt: skip
    line = phased_words(
        tmp_path / "run", more, f"checkpoint.load={run_dir}/checkpoints", f"data.phases={phases}",
        f"training.train_tokens={TRAIN_TOKENS + 1024}", "training.exit_interval=null",
    )  # fmt: skip
    [(ended, steps)] = run_distributed(recorded, 1, line)
    assert ended == "finished"
    assert steps[0].first_sample == 12 * 4
    old = read_saved_plan(run_dir / "checkpoints" / "iter_0000012")
    new = read_saved_plan(tmp_path / "run" / "checkpoints" / f"iter_{STEPS + 4:07d}")
    assert old is not None and new is not None
    begun = np.arange(20 * 4)  # the second phase stays whole
    assert all(
        (a == b).all() for a, b in zip(old.plan.locate(begun), new.plan.locate(begun), strict=True)
    )
    last = records(tmp_path / "run")[-1]
    assert last["consumed_tokens"] == TRAIN_TOKENS + 1024
    assert last["source_tokens"]["books"] == 64 * 16  # half of 8 steps of 4


def test_a_plan_of_another_checkpoint(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """A plan that says more was read than the checkpoint, or that is damaged or gone, is refused;
    a checkpoint that never had one goes on at its sample of the plan that its config makes."""
    run_dir, sources = stopped
    lines = []
    for name, damage in {
        "other": lambda text: json.dumps(json.loads(text) | {"consumed_samples": 52}),
        "torn": lambda text: text[: len(text) // 2],
        "changed": lambda text: text.replace('"web"', '"wep"'),
    }.items():
        shutil.copytree(run_dir / "checkpoints", tmp_path / name / "checkpoints")
        path = tmp_path / name / "checkpoints" / "iter_0000012" / PLAN
        path.write_text(damage(path.read_text()))
        unverified = f"checkpoint.verify_integrity={'true' if name == 'changed' else 'false'}"
        lines.append(phased_words(tmp_path / name, sources, unverified))
    for name in ("gone", "never"):
        shutil.copytree(run_dir / "checkpoints", tmp_path / name / "checkpoints")
        (tmp_path / name / "checkpoints" / "iter_0000012" / PLAN).unlink()
        verify = f"checkpoint.verify_integrity={'true' if name == 'gone' else 'false'}"
        lines.append(phased_words(tmp_path / name, sources, verify))
    other, torn, changed, gone, never = run_distributed(outcomes, 1, lines)[0]
    assert re.search(f"cannot be loaded: .*{PLAN}", gone, re.DOTALL), gone
    assert never == "finished"
    assert [record["iteration"] for record in records(tmp_path / "never")] == [
        *range(13, STEPS + 1)
    ]
    assert "not of this checkpoint: it says that 52 samples were read, the checkpoint 48" in other
    assert f"{PLAN} is damaged" in torn
    assert changed.startswith(("DataError", "UserError"))


def own_line(lines: list[list[str]]) -> list[str]:
    """On a rank: how the run ends whose command line is this rank's own."""
    return outcomes([lines[torch.distributed.get_rank()]])


def test_ranks_whose_files_differ(tmp_path: Path) -> None:
    """Nodes with other copies of the token files are found out before anything is trained."""
    names = ("web", "code", "math")
    lines = [
        phased_words(tmp_path / "run", corpora(tmp_path / node, *names)) for node in ("one", "two")
    ]
    corpus(tmp_path / "two" / "code", seed=99)
    for [text] in run_distributed(own_line, 2, lines):
        assert text.startswith("UserError: ranks 1 plan other data than rank 0")


def test_batches_that_ranks_cannot_divide(stopped: tuple[Path, str], tmp_path: Path) -> None:
    """A short batch at the end of a phase that does not fit the ranks is found before training."""
    run_dir, sources = stopped
    line = phased_words(
        tmp_path, sources, f"checkpoint.load={run_dir}/checkpoints",
        "training.global_batch_size=12", "training.micro_batch_size=3",
    )  # fmt: skip
    text = run_distributed(outcomes, 2, [line])[0][0]
    assert "global batches of 4, 8 samples lie ahead" in text, text
    assert "training.micro_batch_size=3 * data-parallel size=2 = 6" in text
    assert "allowed for the product: 1, 2, 4" in text


def test_a_plan_is_held_against_the_data_before_any_work(tmp_path: Path) -> None:
    """A cap that the run would cross is refused before the engine, with source and phase."""
    sources = corpora(tmp_path, "web", "code", "math")
    line = phased_words(tmp_path / "run", sources, "data.max_epochs=0.2")
    text = run_distributed(outcomes, 2, [line])[1][0]
    assert text.startswith("DataError: data.max_epochs=0.2: the run reads source ")
    assert not (tmp_path / "run").exists()
