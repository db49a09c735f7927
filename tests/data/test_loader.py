"""The order of samples depends on how many were read, and on nothing else."""

import multiprocessing
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Span, Steps
from megatron_hybrid.data.datasets import open_windows, plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.loader import Replica, _MicroBatches, build_iterator
from megatron_hybrid.data.mock import MockWindows
from megatron_hybrid.data.source import open_sources
from megatron_hybrid.data.tokenizer import NullTokenizer
from megatron_hybrid.data.tokenizing import tokenize
from megatron_hybrid.data.windows import Windows
from tests.data.conftest import EOD, VOCAB_SIZE, write_corpus, write_jsonl
from tests.data.tokenizing.samples import settings_in

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def dataset() -> MockWindows:
    return MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(1,))


def constant(config: RunConfig, samples: int = 80) -> Steps:
    """Steps of one length and size."""
    return Steps([Span(0, samples, 32)], ((0, config.training.global_batch_size),))


def read(
    dataset: Windows,
    config: RunConfig,
    steps: Steps | None = None,
    *,
    consumed: int = 0,
    rank: int = 0,
    size: int = 1,
) -> list[Batch]:
    """All batches of one rank up to the end of the data."""
    return list(
        build_iterator(
            dataset,
            steps or constant(config),
            config,
            consumed_samples=consumed,
            replica=Replica(rank, size),
        )
    )


def windows_of(dataset: Windows) -> Tensor:
    return torch.from_numpy(dataset.__getitems__(range(80)))


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_layout_does_not_change_global_batches(
    dataset: MockWindows, make_config: MakeConfig, size: int, micro: int
) -> None:
    """Any DP and micro-batch size reads the same global batches, ranks one after the other."""
    config = make_config(micro_batch_size=micro)
    ranks = [
        torch.cat([b.tokens for b in read(dataset, config, rank=r, size=size)]) for r in range(size)
    ]
    share = 8 // size
    batches = torch.stack(ranks).view(size, 10, share, 32).transpose(0, 1).reshape(10, 8, 32)
    alone = torch.cat([b.tokens for b in read(dataset, make_config(micro_batch_size=8))])
    assert torch.equal(batches, alone.view(10, 8, 32))
    for batch, expected in zip(batches, windows_of(dataset)[:, :-1].view(10, 8, 32), strict=True):
        assert sorted(batch.tolist()) == sorted(expected.tolist())


class Numbers:
    """Windows that hold nothing but their own number; even ones are of one source, odd of another.

    Samples from 42 on are twice as long.
    """

    eod, vocab_size, conversations = EOD, VOCAB_SIZE, False

    def __len__(self) -> int:
        return 80

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        lengths = {33 if index < 42 else 65 for index in indices}
        assert len(lengths) == 1, "a micro-batch has samples of one length"
        return np.repeat(np.array(indices)[:, None], lengths.pop(), axis=1)

    def document_ends(self, indices: Sequence[int]) -> NDArray[np.bool_]:
        return np.zeros((len(indices), 33 if indices[0] < 42 else 65), dtype=np.bool_)

    def describe(self, index: int, token: int) -> str:
        return f"window {index}, token {token}"


# Batches of 8, from 640 tokens on of 4; the last one of the first span is short, as is the last.
VARYING = Steps([Span(0, 42, 32), Span(42, 80, 64)], ((0, 8), (640, 4), (1500, 16)))
SIZES = [8, 8, 8, 4, 4, 4, 4, 2, 4, 16, 16, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_steps_of_other_sizes_and_lengths(
    make_config: MakeConfig, workers: int, packed: bool
) -> None:
    """Each global batch has the samples that Steps say, whatever its size and length."""
    config = make_config({"num_workers": workers, "packed_documents": packed}, micro_batch_size=1)
    ranks = [read(Numbers(), config, VARYING, rank=rank, size=2) for rank in range(2)]
    first = 0
    for size in SIZES:
        micro_batches = [batches.pop(0) for batches in ranks for _ in range(size // 2)]
        length = 32 if first < 42 else 64
        assert {batch.tokens.shape for batch in micro_batches} == {(1, length)}
        rows = torch.cat([batch.tokens for batch in micro_batches])
        assert sorted(rows[:, 0].tolist()) == list(range(first, first + size))
        first += size
    assert not any(ranks)


@pytest.mark.parametrize(("size", "batch"), [(2, 4), (2, 8), (4, 8), (4, 4)])
def test_no_rank_reads_one_source_alone(make_config: MakeConfig, size: int, batch: int) -> None:
    """Of a blend in which two sources take turns, each rank reads about as much of either."""
    config = make_config(micro_batch_size=1, global_batch_size=batch)
    steps = Steps([Span(0, 1600, 32)], ((0, batch),))
    for rank in range(size):
        places = _MicroBatches(steps, 0, 1, Replica(rank, size), config.training.seed)
        odd = sum(sample % 2 for (sample,) in places)
        share = 1600 // size
        assert abs(odd - share / 2) < 4 * (share / 4) ** 0.5  # four sigmas of fair draws


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_resume(dataset: MockWindows, make_config: MakeConfig, workers: int, packed: bool) -> None:
    """Starting at sample 24 gives the batches of an unbroken run, with any number of workers."""
    data = {"packed_documents": packed}
    whole = read(dataset, make_config(data))
    resumed = read(dataset, make_config(data | {"num_workers": workers}), consumed=24)
    assert len(resumed) == len(whole) - 12
    for a, b in zip(whole[12:], resumed, strict=True):
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_shapes_and_labels(dataset: MockWindows, make_config: MakeConfig) -> None:
    """Labels are the next tokens, also over the edge of a window; shapes are the legend's."""
    batch = read(dataset, make_config())[0]
    rows = torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1)
    assert all(any(torch.equal(row, window) for window in windows_of(dataset)[:8]) for row in rows)
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])
    assert batch.position_ids.tolist() == [list(range(32))] * 2
    assert batch.loss_mask.sum() == 64
    assert batch.cu_seqlens is None and batch.max_seqlen is None and batch.seq_idx is None
    packed = read(dataset, make_config({"packed_documents": True}))[0]
    assert packed.tokens.shape == packed.labels.shape == packed.loss_mask.shape == (1, 64)
    assert packed.position_ids.shape == packed.seq_idx.shape == (1, 64)
    assert torch.equal(packed.tokens.view(2, 32), batch.tokens)
    assert torch.equal(packed.labels.view(2, 32), batch.labels)
    assert torch.equal(packed.loss_mask == 0, packed.tokens == EOD)
    assert packed.cu_seqlens[-1] == 64 and 32 in packed.cu_seqlens


def test_reading_leaves_the_models_random_numbers_alone(
    dataset: MockWindows, make_config: MakeConfig
) -> None:
    """Starting an iterator draws nothing from the generator that dropout uses."""
    before = torch.get_rng_state()
    read(dataset, make_config())
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_outlive_the_jobs_signals(dataset: MockWindows, make_config: MakeConfig) -> None:
    """SIGTERM and SIGUSR1 to every process of a job end no reader; closing the iterator does."""
    others = set(multiprocessing.active_children())
    config = make_config({"num_workers": 2})
    iterator = build_iterator(
        dataset, constant(config), config, consumed_samples=0, replica=Replica()
    )
    next(iterator), next(iterator)  # one of each worker: both have started
    workers = [each for each in multiprocessing.active_children() if each not in others]
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    assert len(list(islice(iterator, 38))) == 38
    del iterator
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]  # each by itself: nobody killed it


@pytest.mark.parametrize("lost", [False, True])
def test_held_iterator_at_exit(
    dataset: MockWindows, make_config: MakeConfig, tmp_path: Path, lost: bool
) -> None:
    """A process ends while an iterator is held, though its readers ignore SIGTERM.

    One whose reader was killed reports that; it does not wait forever for the readers left.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_hold_iterator, args=(dataset, make_config({"num_workers": 2}), tmp_path, lost)
    )
    process.start()
    try:
        process.join(timeout=30)
        assert process.exitcode == int(lost)
    finally:
        process.kill()


def _hold_iterator(dataset: Windows, config: RunConfig, folder: Path, lost: bool) -> None:
    tempfile.tempdir = str(folder)  # torch may be told of the loss while it makes a file there
    iterator = build_iterator(
        dataset, constant(config), config, consumed_samples=0, replica=Replica()
    )
    sys.held = iterator  # type: ignore[attr-defined]  # as an error's traceback holds it
    next(iterator), next(iterator)
    if lost:
        multiprocessing.active_children()[0].kill()
        list(iterator)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE])
@pytest.mark.parametrize(
    "kind", [*get_args(DataConfig.model_fields["sample_order"].annotation), "mock"]
)
def test_ids_outside_the_vocabulary(
    tmp_path: Path, make_config: MakeConfig, kind: str, bad: int, workers: int
) -> None:
    """Below 0 or above the vocabulary, whoever reads them: the file and the place in it, in one
    line, before an embedding is indexed."""
    write_corpus(tmp_path / "good", [[1] * 300], 100_000)
    documents = [[5] * 50 for _ in range(12)]
    documents[7][20] = bad
    write_corpus(tmp_path / "bad", documents, 100_000)
    path = [[1, str(tmp_path / "good")], [3, str(tmp_path / "bad")]]
    data = {"data_path": path, "split": "1,0,0", "sample_order": kind}
    data = {"mock_data": True} if kind == "mock" else data
    config = make_config(data | {"num_workers": workers})
    tokenizer = NullTokenizer(VOCAB_SIZE)
    plan = plan_data(config, tokenizer, None)
    windows, _ = open_windows(config, tokenizer, plan)
    place = rf"{tmp_path}/bad\.bin: document 7, token 20 \(byte {4 * 370}\)"
    if kind == "mock":
        windows, place = _Damaged(windows, bad), r"window \d+ of made-up tokens, token 3"
    with pytest.raises(DataError, match=rf"{place}: id {bad} is outside .* \(0 … 999\): ") as error:
        read(windows, config, plan.steps)
    assert "\n" not in str(error.value)


class _Damaged:
    """Windows with a wrong id."""

    conversations = False

    def __init__(self, windows: Windows, bad: int) -> None:
        self.vocab_size, self.eod = VOCAB_SIZE, EOD
        self.describe, self.document_ends = windows.describe, windows.document_ends
        self._windows, self._bad = windows, bad

    def __len__(self) -> int:
        return len(self._windows)

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.int64]:
        rows = self._windows.__getitems__(indices)
        rows[-1, 3] = self._bad
        return rows


def documents_of(batch: Batch) -> list[list[int]]:
    """The documents of a packed batch, by its boundaries."""
    assert batch.cu_seqlens is not None
    return [part.tolist() for part in batch.tokens[0].tensor_split(batch.cu_seqlens[1:-1].long())]


@pytest.mark.parametrize("facts", [False, True])
@pytest.mark.parametrize("order", get_args(DataConfig.model_fields["sample_order"].annotation))
def test_documents_without_end_tokens(
    tmp_path: Path, make_config: MakeConfig, order: str, facts: bool
) -> None:
    """They are packed by the index of their files: the batches of files with end tokens, but for
    these. Every document is one run of one id; the mask is 0 where the next token is another's."""
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    texts = [[number % 900] * int(length) for number, length in enumerate(lengths)]
    data = {"packed_documents": True, "split": "1,0,0", "sample_order": order}
    for shard in range(2):
        prefix = tmp_path / f"web{shard}"
        own = texts[shard::2]
        if facts:
            path = write_jsonl(tmp_path / "in.jsonl", [" ".join(map(str, text)) for text in own])
            options = {"outputs": {"text": prefix}, "append_eod": False}
            tokenize(settings_in(tmp_path, path, **options))
        else:
            write_corpus(prefix, own)
    paths = [[1, str(tmp_path / f"web{shard}")] for shard in range(2)]
    config = make_config(data | {"data_path": paths})
    tokenizer = NullTokenizer(VOCAB_SIZE)
    plan = plan_data(config, tokenizer, None)
    batches = read(open_windows(config, tokenizer, plan)[0], config, plan.steps)
    seen = 0
    for batch in batches:
        assert batch.tokens.min() >= 0 and batch.labels.min() >= 0
        for document in documents_of(batch):
            assert len(set(document)) == 1
            seen += 1
        # Documents that follow each other have other ids, but where Megatron's order meets itself.
        assert torch.equal(batch.loss_mask == 1, batch.labels == batch.tokens)
    assert seen > 2 * 80  # where nothing is packed, there are as many as samples


def test_many_short_documents(tmp_path: Path) -> None:
    """More than are read at once; each is found, and nothing twice."""
    write_corpus(tmp_path / "web", [[1]] * 1000)
    source = open_sources({"web": [str(tmp_path / "web")]})["web"]
    assert source.document_ends(0, 1000) == list(range(1000))
    assert source.document_ends(300, 128) == list(range(128))
    assert source.document_ends(999, 1) == [0]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Where the index's marks put sequences together, as --split-sentences does, they are one."""
    write_corpus(tmp_path / "web", [[n] * 5 for n in range(8)])
    index = tmp_path / "web.idx"
    content = index.read_bytes()
    counts = struct.pack("<QQ", 8, 4)
    marks = struct.pack("<4q", 0, 3, 4, 8)
    index.write_bytes(content[:18] + counts + content[34 : 34 + 12 * 8] + marks)
    source = open_sources({"web": [str(tmp_path / "web")]})["web"]
    assert source.document_ends(0, 40) == [14, 19, 39]
    assert source.document_ends(12, 8) == [2, 7]
    assert source.document_ends(15, 4) == source.document_ends(20, 19) == []


def test_mock_documents(dataset: MockWindows) -> None:
    """A window is a pure function of its number; documents count by one stride and end."""
    again = MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(1,))
    other = MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(2,))
    seven = dataset.__getitems__([7, 8])
    assert (again.__getitems__([8, 7])[::-1] == seven).all()
    assert (other.__getitems__([7])[0] != seven[0]).any()
    assert (seven[1] != seven[0]).any()
    tokens = seven[0].tolist()
    assert EOD in tokens and len(tokens) == 33
    document = tokens[: tokens.index(EOD)]
    strides = {(b - a) % EOD for a, b in pairwise(document)}
    assert len(strides) <= 1
    with pytest.raises(IndexError):
        dataset.__getitems__([80])
