"""The order of samples depends on how many were read, and on nothing else."""

import os
import signal
import time
from collections.abc import Callable
from itertools import islice, pairwise

import psutil
import pytest
import torch

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.loader import build_iterator
from megatron_hybrid.data.mock import MockWindows
from tests.data.conftest import EOD, VOCAB_SIZE

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def dataset() -> MockWindows:
    return MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(1,))


def read(
    dataset: MockWindows, config: RunConfig, *, consumed: int = 0, rank: int = 0, size: int = 1
) -> list[Batch]:
    """All batches of one rank up to the end of the data."""
    batches = []
    iterator = build_iterator(
        dataset,
        config,
        consumed_samples=consumed,
        data_parallel_rank=rank,
        data_parallel_size=size,
    )
    with pytest.raises(DataError, match="the data ends here"):
        while True:
            batches.append(next(iterator))
    return batches


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)])
def test_layout_does_not_change_global_batches(
    dataset: MockWindows, make_config: MakeConfig, size: int, micro: int
) -> None:
    """Any DP and micro-batch size reads the same global batches, in the same order."""
    config = make_config(micro_batch_size=micro)
    ranks = [
        torch.cat([b.tokens for b in read(dataset, config, rank=r, size=size)]) for r in range(size)
    ]
    share = 8 // size
    batches = torch.stack(ranks).view(size, 10, share, 32).transpose(0, 1).reshape(80, 32)
    expected = torch.stack([torch.from_numpy(dataset[i][:-1]) for i in range(80)])
    assert torch.equal(batches, expected)


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
    assert torch.equal(batch.tokens[0], torch.from_numpy(dataset[0][:-1]))
    assert torch.equal(batch.labels[0], torch.from_numpy(dataset[0][1:]))
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
    own = psutil.Process()
    others = set(own.children())
    iterator = build_iterator(
        dataset,
        make_config({"num_workers": 2}),
        consumed_samples=0,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    next(iterator)
    workers = [child for child in own.children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    assert len(list(islice(iterator, 39))) == 39
    start = time.monotonic()
    del iterator
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert time.monotonic() - start < 4


def test_ids_outside_the_vocabulary(dataset: MockWindows, make_config: MakeConfig) -> None:
    """Files made with a larger tokenizer are found out before an embedding is indexed."""
    dataset.vocab_size = 10
    iterator = build_iterator(
        dataset, make_config(), consumed_samples=0, data_parallel_rank=0, data_parallel_size=1
    )
    with pytest.raises(DataError, match="the tokenizer has 10 ids"):
        next(iterator)


def test_mock_documents(dataset: MockWindows) -> None:
    """A window is a pure function of its number; documents count by one stride and end."""
    again = MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(1,))
    other = MockWindows(size=80, seq_length=32, vocab_size=VOCAB_SIZE, eod=EOD, seed=(2,))
    assert (again[7] == dataset[7]).all()
    assert (other[7] != dataset[7]).any()
    assert (dataset[8] != dataset[7]).any()
    tokens = dataset[7].tolist()
    assert EOD in tokens and len(tokens) == 33
    document = tokens[: tokens.index(EOD)]
    strides = {(b - a) % EOD for a, b in pairwise(document)}
    assert len(strides) <= 1
    with pytest.raises(IndexError):
        dataset[80]
