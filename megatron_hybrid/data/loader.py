"""Windows to micro-batches: which rank reads which samples, and in what order.

Samples are numbered through the run, and `Steps` says which of them a global batch takes, whatever
the layout. Within a batch, places are shuffled by a key of its first sample; data-parallel rank r
takes the r-th contiguous share and cuts it into micro-batches. So the place in the data is one
integer, a run may go on with another data-parallel or micro-batch size over the very same global
batches, and no rank is given one source of a blend again and again.

Shapes: b = micro_batch_size, s = seq_length; packed batches are one row, `[1, b*s]`.
"""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Steps
from megatron_hybrid.data.checked_windows import LEARNT, CheckedWindows
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.packing import pack_documents
from megatron_hybrid.data.permutation import derive, permute
from megatron_hybrid.data.windows import Windows


@dataclass(frozen=True)
class Replica:
    """One of the data-parallel ranks, `rank` in `[0, size)`."""

    rank: int = 0
    size: int = 1


def build_iterator(
    dataset: Windows,
    steps: Steps,
    config: RunConfig,
    *,
    consumed_samples: int,
    replica: Replica,
) -> Iterator[Batch]:
    """Micro-batches of one data-parallel rank, in order, from sample `consumed_samples` on.

    Args:
        dataset: the windows of a split.
        steps: its global batches, each a multiple of `micro_batch_size` times `replica.size`.
        config: `training.micro_batch_size`, `training.seed`, `data.packed_documents`,
            `data.num_workers`.
        consumed_samples: samples that all ranks together have read before.

    Yields:
        `batch / (micro_batch_size * replica.size)` micro-batches a global batch.

    Raises:
        DataError: a file cannot be read, or holds an id outside the tokenizer's vocabulary.
    """
    training = config.training
    micro_batches = _MicroBatches(
        steps, consumed_samples, training.micro_batch_size, replica, training.seed
    )
    loader: DataLoader[Tensor | DataError] = DataLoader(
        # Torch asks for its base class, and uses none of it.
        CheckedWindows(dataset, mark_ends=config.data.packed_documents),  # type: ignore[arg-type]
        batch_sampler=micro_batches,
        # One tensor a micro-batch: handing a tensor over between processes costs more than filling
        # it, so the rest of a batch is made where it is used.
        collate_fn=_as_tensor,
        num_workers=config.data.num_workers,
        # A forked worker starts in milliseconds and shares the parent's maps of the data.
        multiprocessing_context="fork" if config.data.num_workers else None,
        worker_init_fn=_ignore_signals,
        # Torch draws a seed for its workers, by default from the model's own random numbers.
        generator=torch.Generator(),
    )
    return _batches(loader, micro_batches, config.data.packed_documents, dataset.conversations)


def read_batch(dataset: Windows, samples: Sequence[int], config: RunConfig) -> Batch:
    """A micro-batch of any samples of one length, read here and now.

    Raises:
        DataError: as `build_iterator`.
    """
    packed = config.data.packed_documents
    rows = CheckedWindows(dataset, mark_ends=packed).__getitems__(samples)
    if isinstance(rows, DataError):
        raise rows
    whole = torch.from_numpy(rows)
    batch = _packed_batch(whole, dataset.conversations) if packed else _plain_batch(whole)
    return replace(batch, samples=tuple(samples))


def _batches(
    loader: DataLoader[Tensor | DataError],
    micro_batches: Iterable[list[int]],
    packed: bool,
    conversations: bool,
) -> Iterator[Batch]:
    has_cuda = torch.cuda.is_available()
    at_exit = Finalize(None, _kill_workers, exitpriority=0)
    try:
        # The loader has asked for samples ahead; here they are counted as they come.
        for rows, samples in zip(loader, micro_batches, strict=True):
            if isinstance(rows, DataError):
                raise rows
            batch = _packed_batch(rows, conversations) if packed else _plain_batch(rows)
            batch = replace(batch, samples=tuple(samples))
            yield batch.pin_memory() if has_cuda else batch
    except GeneratorExit:  # nobody holds it; after any other error, a traceback does
        pass
    at_exit.cancel()


def _as_tensor(rows: Any) -> Tensor | DataError:
    return rows if isinstance(rows, DataError) else torch.from_numpy(rows)


def _plain_batch(rows: Tensor) -> Batch:
    """From windows `[b, s + 1]`."""
    samples, seq_length = rows.shape[0], rows.shape[1] - 1
    return Batch(
        tokens=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        loss_mask=torch.ones(samples, seq_length),
        position_ids=torch.arange(seq_length).repeat(samples, 1),
    )


def _packed_batch(marked: Tensor, conversations: bool) -> Batch:
    """From windows `[b, s + 1]` with marks at the ends of documents; one row of `b*s`."""
    is_end = marked < 0
    rows = torch.where(is_end, ~marked, marked)
    learnt = rows >= LEARNT if conversations else torch.ones_like(is_end)
    rows = torch.where(learnt, rows - LEARNT, rows) if conversations else rows
    tokens = rows[:, :-1].contiguous()
    packing = pack_documents(is_end[:, :-1])
    return Batch(
        tokens=tokens.view(1, -1),
        labels=rows[:, 1:].reshape(1, -1),
        loss_mask=packing.loss_mask * learnt[:, 1:].reshape(1, -1),
        position_ids=packing.position_ids,
        cu_seqlens=packing.cu_seqlens,
        max_seqlen=packing.max_seqlen,
        seq_idx=packing.seq_idx,
    )


@dataclass(frozen=True)
class _MicroBatches(Sampler[list[int]]):
    """The sample numbers of each micro-batch of one rank."""

    steps: Steps
    consumed_samples: int
    micro_batch_size: int
    replica: Replica
    seed: int

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples
        while first < self.steps.samples:
            size = self.steps.batch_size(first)
            share, rest = divmod(size, self.replica.size)
            assert rest == 0 and share % self.micro_batch_size == 0, "checked when the run began"
            own = slice(self.replica.rank * share, (self.replica.rank + 1) * share)
            samples = (first + _places(size, self.seed, first)[own]).tolist()
            for micro in range(0, share, self.micro_batch_size):
                yield samples[micro : micro + self.micro_batch_size]
            first += size


def _places(size: int, seed: int, first_sample: int) -> NDArray[np.int64]:
    """The places `[0, size)` of a global batch in the order in which ranks take them."""
    key = derive(derive(np.zeros(1, dtype=np.uint64), seed), first_sample)
    return permute(np.arange(size), size, key).astype(np.int64)


def _ignore_signals(worker: int) -> None:
    """Leave the run's signals to the trainer: a scheduler sends them to every process of a job,
    and a reader that ended early would take the last, orderly steps of the run with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """When this process ends while an iterator is still held, as it is by an error's traceback.

    Python would send its readers SIGTERM, of which they take no notice, and wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as failed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
