"""A teacher's answers are kept by what samples are: made by any workers, killed or not, and read by
any run; what is not there, or not what it was, is said by name."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_hybrid.config import load_config
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.run_plan import open_run_sources, training_plan
from megatron_hybrid.objectives.registry import objective_problems
from megatron_hybrid.teachers.cache_block import Answers, BlockReader, decode, encode
from megatron_hybrid.teachers.cache_find import Finder
from megatron_hybrid.teachers.cache_spec import CacheSpec, read_cache
from megatron_hybrid.testing import run_distributed
from tests.objectives.test_sft import corpus as conversations
from tests.training.phased import corpora, phased_words
from tests.training.runs import VOCAB_SIZE, losses, outcomes, records, words
from tests.warm import program_of, python

STUDENT = ["model.hidden_size=16", "model.mamba_head_dim=8"]
EVALUATED = ["training.eval_interval=12", "training.eval_iters=1"]
OPTIONS = "training.objective_options"


class Made(NamedTuple):
    """A teacher, the words of a run of four phases, and the answers to all of its samples."""

    teacher: Path
    line: list[str]
    cache: Path


def command(line: Sequence[str], teacher: Path, output: Path, *more: str) -> list[str]:
    return [
        python(), "-m", "megatron_hybrid.cli", "distill", "cache", *line,
        "--teacher", str(teacher), "--output", str(output), "--block-samples", "5", *more,
    ]  # fmt: skip


def make(line: Sequence[str], teacher: Path, output: Path, *more: str) -> str:
    done = subprocess.run(
        command(line, teacher, output, *more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Job = tuple[Sequence[str], Path, Path, dict[str, Any]]


def work_of(jobs: Sequence[Job]) -> None:
    """On a rank of a worker: words of runs, their teachers, folders, and what is asked for."""
    import torch.distributed as dist

    from megatron_hybrid.platform import initialize
    from megatron_hybrid.teachers.cache_open import Asked, open_caching
    from megatron_hybrid.teachers.cache_write import work
    from megatron_hybrid.training.distributed import model_parallel_groups

    platform = initialize()
    for line, teacher, output, more in jobs:
        asked = Asked(teacher, output, block_samples=5, **more)
        opened = open_caching(line, asked, dist.get_world_size())
        with model_parallel_groups(opened.config, platform):
            work(opened, "torch", platform.device)


ALL = {"top_k": VOCAB_SIZE}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("cache")
    teacher, cache = folder / "teacher", folder / "answers"
    first = words(teacher, "model.hybrid_layer_pattern=M*M-", "training.seed=7")
    assert run_distributed(outcomes, 1, [first])[0] == ["finished"]
    sources = corpora(folder, "math", "code", "web")
    line = phased_words(folder / "run", sources, *STUDENT, *EVALUATED)
    run_distributed(work_of, 1, [(line, teacher, cache, ALL)])
    return Made(teacher, line, cache)


def learning(made: Made, run_dir: Path, *more: str, live: bool = False) -> list[str]:
    named = f"teacher={made.teacher}" if live else f"cache={made.cache}"
    return [
        *made.line, f"run_dir={run_dir}", "training.objective=distillation", f"{OPTIONS}.{named}",
        *more,
    ]  # fmt: skip


def test_a_run_learns_as_from_the_live_teacher(made: Made, tmp_path: Path) -> None:
    """Of the whole vocabulary, losses and figures of steps and evaluations are those of the live
    teacher; resumed it is the same to the bit; and so, but for rounding, on two ranks and then on
    one, in other micro batches and with another size of global batches from the middle on, with
    other phases to come."""
    live, whole, resumed, moved, sized = (tmp_path / str(number) for number in range(5))
    half = "training.exit_interval=14"
    # The last two phases have each other's weights.
    swapped = [("{web: 1, code: 1, math: 1}", "X"), ("{math: 1}", "{web: 1, code: 1, math: 1}")]

    def edited(run_dir: Path, *, live: bool) -> list[str]:
        line = learning(made, run_dir, "training.global_batch_size=2", live=live)
        for was, now in (*swapped, ("X", "{math: 1}")):
            line = [each.replace(was, now) for each in line]
        return line

    two = [learning(made, moved, half)]
    assert run_distributed(outcomes, 2, two)[0] == ["exit_interval"]
    lines = [
        learning(made, live, half, live=True),
        edited(live, live=True),
        learning(made, whole),
        learning(made, resumed, half),
        learning(made, resumed),
        learning(made, moved, "training.micro_batch_size=1", "training.global_batch_size=4"),
        learning(made, sized, half),
        edited(sized, live=False),
    ]
    found = run_distributed(outcomes, 1, lines)[0]
    exits = ["exit_interval", "finished"]
    assert found == [*exits, "finished", *exits, "finished", *exits]
    for kind in ("train", "validation"):
        assert len(records(sized, kind)) == len(records(live, kind))
        for a, b in zip(records(live, kind), records(sized, kind), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["extra"] == pytest.approx(a["extra"], rel=1e-5)
    assert losses(resumed) == losses(whole)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    assert len(losses(sized)) == 14 + 2 * 14
    assert losses(sized)[:14] == losses(whole)[:14]


def test_any_layout_learns_the_same(made: Made, tmp_path: Path) -> None:
    """Parts of the vocabulary, of sequences and stages, of half of the words: losses, norms and
    figures of one rank."""
    few = tmp_path / "few"
    run_distributed(work_of, 1, [(made.line, made.teacher, few, {"top_k": 30})])
    half = [
        f"{OPTIONS}.cache={few}", "training.exit_interval=3", "training.eval_interval=3",
        f"checkpoint.load={tmp_path / 'first' / 'checkpoints'}", "checkpoint.finetune=true",
    ]  # fmt: skip
    mixed = [f"{OPTIONS}.kl_type=mixed", f"{OPTIONS}.lm_loss_weight=0.5"]
    split = [
        "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "parallel.context_parallel_size=2",
    ]  # fmt: skip
    staged = ["parallel.pipeline_model_parallel_size=2", "model.hybrid_layer_pattern=M*|-"]
    one = learning(made, tmp_path / "one", *half, *mixed)
    lines = [
        learning(made, tmp_path / "split", *half, *mixed, *split),
        learning(made, tmp_path / "staged", *half, *mixed, *staged, "training.micro_batch_size=1"),
    ]
    first = words(tmp_path / "first", *STUDENT)  # whose weights all begin with
    assert run_distributed(outcomes, 1, [first, one])[0] == ["finished", "exit_interval"]
    assert run_distributed(outcomes, 4, lines)[0] == ["exit_interval"] * 2
    for name in ("split", "staged"):
        for kind in ("train", "validation"):
            both = zip(records(tmp_path / "one", kind), records(tmp_path / name, kind), strict=True)
            for a, b in both:
                assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
                assert b["extra"] == pytest.approx(a["extra"], rel=1e-5)
                if kind == "train":
                    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


def test_conversations(made: Made, tmp_path: Path) -> None:
    """Rows of whole conversations, packed, of which the assistant's tokens are learnt."""
    chats = conversations(tmp_path / "chats", 1)
    line = words(
        tmp_path / "run", *STUDENT, "data.packed_documents=true", "data.mock_data=false",
        f"data.data_path={chats}", "training.objective=sft_distillation",
    )  # fmt: skip
    run_distributed(work_of, 1, [(line, made.teacher, tmp_path / "it", ALL)])
    runs = [tmp_path / "live", tmp_path / "cached"]
    lines = [
        [*line, f"run_dir={run_dir}", f"{OPTIONS}.{named}"]
        for run_dir, named in zip(
            runs, (f"teacher={made.teacher}", f"cache={tmp_path / 'it'}"), strict=True
        )
    ]
    assert run_distributed(outcomes, 1, lines)[0] == ["finished"] * 2
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)


def plan_of(line: Sequence[str]) -> Plan:
    config = load_config(line)
    return training_plan(config, open_run_sources(config, None))


def test_samples_are_found_by_what_they_are(made: Made) -> None:
    """In plans of other global batches and other phases: every one that is found is the very
    window, and none that the cache has is missed."""
    cache = read_cache(made.cache)
    finder, own = Finder(cache), cache.plans["train"]
    known = {
        window for plan in cache.plans.values() for window in windows(plan, range(plan.samples))
    }
    edited = [each.replace("{web: 1, code: 2}", "{web: 3, math: 1}") for each in made.line]
    for line in (
        [*made.line, "training.global_batch_size=6"],
        [*made.line, "training.global_batch_size=2"],
        edited,
        [each.replace("seq_length: 64", "seq_length: 32") for each in made.line],
    ):
        plan, found = plan_of(line), 0
        assert plan.stretches != own.stretches
        for samples, places in finder.places(plan, "train", 3):
            asked = windows(plan, samples)
            for window, place in zip(asked, places.tolist(), strict=True):
                assert (place >= 0) == (window in known)
                if place >= 0:
                    part, sample = finder.part_of(place)
                    assert windows(cache.plans[part], [sample]) == [window]
                    found += 1
        assert found > 20


def windows(plan: Plan, samples: Any) -> list[tuple[str, int, int]]:
    located = plan.locate(np.array(list(samples)))
    return [
        (plan.sources[source].name, offset, length)
        for source, offset, length in zip(*(each.tolist() for each in located), strict=True)
    ]


def answers(folder: Path) -> list[Answers]:
    cache = read_cache(folder)
    return [
        BlockReader(cache.path(block), cache.digest, block).read(sample, cache.spec)
        for block in cache.blocks()
        for sample in range(block.first_sample, block.end_sample)
    ]


def test_workers_of_any_layout(made: Made, tmp_path: Path) -> None:
    """Parts of the vocabulary and of sequences, stages and replicas: they keep what one rank keeps,
    also where micro batches do not divide blocks."""
    layouts = {"TP2xCP2": ("tensor_model", "context"), "PP2xDP2": ("pipeline_model",)}
    jobs: list[Job] = []
    for name, split in layouts.items():
        sizes = [f"parallel.{each}_parallel_size=2" for each in split]
        line = [*made.line, *sizes, "training.micro_batch_size=3"]
        jobs.append((line, made.teacher, tmp_path / name, ALL))
    run_distributed(work_of, 4, jobs)
    for name in layouts:
        for ours, theirs in zip(answers(tmp_path / name), answers(made.cache), strict=True):
            for each in ("log_sum", "loss"):
                assert getattr(ours, each) == pytest.approx(getattr(theirs, each), rel=1e-5)
            assert np.isneginf(ours.log_tail).all()
            both = [np.zeros_like(each.values) for each in (ours, theirs)]
            for values, each in zip(both, (ours, theirs), strict=True):
                np.put_along_axis(values, each.ids, each.values, axis=1)
            assert both[0] == pytest.approx(both[1], rel=1e-4, abs=1e-5)


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def begun(pid: int) -> int:
    """The process of a command, once there is one."""
    while True:
        with suppress(FileNotFoundError, ValueError):
            return program_of(pid)
        time.sleep(0.001)


def test_killed_and_restarted(made: Made, tmp_path: Path) -> None:
    """At several moments, alone and beside another worker: in the end the same bytes, and nothing
    beside them. A nucleus, of packed documents."""
    line = [*made.line, "data.packed_documents=true"]
    asked = ["--top-k", "9", "--top-p", "0.5", "--min-k", "2"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    make(line, made.teacher, undisturbed, *asked)
    expected = files(undisturbed)
    for number in (0, 2, 8, 15):
        workers = [
            subprocess.Popen(
                command(line, made.teacher, killed, *asked),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for _ in range(1 + (number == 8))
        ]  # fmt: skip
        deadline = time.monotonic() + 60
        while len(list(killed.rglob("*.answers"))) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        for worker in workers:
            os.kill(begun(worker.pid), signal.SIGKILL)
            worker.wait()
        there = {name: data for name, data in files(killed).items() if name in expected}
        assert there == {name: expected[name] for name in there}
    make(line, made.teacher, killed, *asked)
    assert files(killed) == expected
    few, most = (
        read_cache(killed).spec,
        sum(len(each.ids[each.ids >= 0]) for each in answers(killed)),
    )
    assert 2 * few.top_k < most
    assert "have answers" in make(line, made.teacher, killed, *asked)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ([f"{OPTIONS}.cache=/nowhere"], "cache=/nowhere: /nowhere has no cache.json"),
        (["model.vocab_size=65"], f"is of {VOCAB_SIZE} words; it must be model.vocab_size=65"),
        (["data.packed_documents=true"], "is of data.packed_documents=false; it is true"),
        ([f"{OPTIONS}.temperature=2"], "temperature=2.0 must be that of"),
        (["training.objective=sft_distillation"], "is of windows of text; training.objective=sft"),
        ([f"{OPTIONS}.teacher=OTHER"], "has the answers of another teacher than"),
        ([f"{OPTIONS}.teachers={{a: {{weight: 1}}}}", f"{OPTIONS}.cache=null"],
         "teachers.a has neither checkpoint nor cache"),
    ],
)  # fmt: skip
def test_what_is_refused(more: list[str], problem: str, made: Made, tmp_path: Path) -> None:
    """Before any data are looked at: by the option, its value and what is allowed."""
    other = tmp_path / "other"
    if "OTHER" in more[0]:
        first = words(other, "model.hybrid_layer_pattern=M*M-", "training.seed=8")
        assert run_distributed(outcomes, 1, [first])[0] == ["finished"]
    said = [each.replace("OTHER", str(other)) for each in more]
    found = objective_problems(load_config(learning(made, tmp_path, *said), which=()))
    assert problem in "\n".join(found)


def test_another_tokenizer(made: Made, tmp_path: Path) -> None:
    """One of as many words that is another one."""
    text = (made.cache / "cache.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    its = read_cache(made.cache).spec.tokenizer
    (other / "cache.json").write_text(text.replace(its, "another"))
    line = learning(made, tmp_path, f"{OPTIONS}.cache={other}")
    [problem] = objective_problems(load_config(line, which=()))
    assert "is of another tokenizer than data.tokenizer_model=" in problem


def test_what_is_not_there(made: Made, tmp_path: Path) -> None:
    """A block that is gone, an edited past and a longer run are said before the run starts, with
    the first sample; a flipped bit when its sample is read, and nothing is trained on it."""
    copy = tmp_path / "copy"
    for name, data in files(made.cache).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    flipped = copy / "train" / "00000" / "000000002.answers"
    whole = bytearray(flipped.read_bytes())
    whole[len(whole) // 2] ^= 8
    flipped.write_bytes(whole)
    lines = [
        learning(made, tmp_path / "flipped", f"{OPTIONS}.cache={copy}"),
        learning(made, tmp_path / "seed", "training.seed=9"),
        learning(made, tmp_path / "longer", "training.train_tokens=7000"),
    ]
    bit, seed, longer = run_distributed(outcomes, 1, lines)[0]
    assert "000000002.answers is damaged: the answers to sample" in bit
    assert len(losses(tmp_path / "flipped")) <= 3
    for text in (seed, longer):
        assert "samples of the train plan; the first is sample" in text
        assert "are in no plan of it, which was of other phases" in text
    (copy / "train" / "00000" / "000000001.answers").unlink()
    (gone,) = run_distributed(
        outcomes, 1, [learning(made, tmp_path / "gone", f"{OPTIONS}.cache={copy}")]
    )[0]
    assert "lacks 5 of the" in gone and "the first is sample 5, 32 tokens from" in gone
    assert "`megatron-hybrid distill cache` was not finished" in gone
    assert not (tmp_path / "gone" / "metrics.jsonl").exists()


def test_a_folder_of_other_answers(made: Made, tmp_path: Path) -> None:
    """Is left as it is, and what differs is named; so is one of other files."""
    before = files(made.cache)
    more = [*made.line, "training.seed=9", "data.packed_documents=true"]
    (tmp_path / "file").write_text("")
    for line, folder, problem in (
        (more, made.cache, "packed_documents=true was false"),
        (more, made.cache, "the plan of train is of other samples: its seed"),
        (made.line, made.cache, f"top_k=7 was {VOCAB_SIZE}"),
        (made.line, tmp_path, "holds other files, and no cache.json"),
    ):
        done = subprocess.run(
            command(line, made.teacher, folder, "--top-k", "7"),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert problem in done.stderr
    assert files(made.cache) == before


def test_how_large_it_is(made: Made, tmp_path: Path) -> None:
    """A dry run says it, of a trillion tokens too; what is written is that and a table."""
    text = make(
        [*made.line, "training.train_tokens=1000000000000"], made.teacher, tmp_path / "it",
        "--dry-run", "--dtype", "bf16",
    )  # fmt: skip
    assert (
        "tokens, 268 bytes a token (64 ids and bf16 logits, 4.19 bytes each in all): 268 TB" in text
    )
    assert not (tmp_path / "it").exists()
    cache = read_cache(made.cache)
    [*blocks] = cache.blocks()
    size = sum(cache.path(block).stat().st_size for block in blocks)
    samples = sum(plan.samples for plan in cache.plans.values())
    assert size == cache.spec.token_bytes() * cache.tokens + 12 * samples + 61 * len(blocks)


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("vocab_size", [300, 65536, 131072, 256000])
def test_rows(vocab_size: int, top_p: float | None) -> None:
    """Ids of vocabularies of 16 to 18 bits, and bits of logits, come back, in the bytes said."""
    tokens, k = 16, 8
    spec = CacheSpec(
        teacher="", tokenizer="", eod=0, vocab_size=vocab_size, packed_documents=False,
        conversations=False, temperature=1.0, top_k=k, top_p=top_p, min_k=1, dtype="bf16",
        block_samples={},
    )  # fmt: skip
    draws = np.random.default_rng(0)
    ids = draws.integers(0, vocab_size, (tokens, k))
    ids[0, 0] = vocab_size - 1
    values = draws.integers(0, 2**16, (tokens, k), dtype=np.uint16)
    if top_p is not None:
        for token, row in enumerate(ids):
            row[1 + token % k :] = -1
        values[ids < 0] = 0
    each = draws.standard_normal((3, tokens), dtype=np.float32)
    row = encode(Answers(ids, values, *each), spec)
    assert len(row) <= spec.token_bytes() * tokens
    if top_p is None:
        assert len(row) == spec.token_bytes() * tokens
    found = decode(memoryview(row), spec, tokens)
    for one, other in zip(vars(found).values(), (ids, values, *each), strict=True):
        assert np.array_equal(one, other)
