"""Windows to micro-batches: which rank reads which samples, and in what order.

Samples are numbered through the run. A global batch is the next `global_batch_size` of them,
whatever the layout: data-parallel rank r takes the r-th contiguous share of it and cuts that into
micro-batches. So the place in the data is one integer, and a run may go on with another
data-parallel or micro-batch size over the very same global batches.

Shapes: b = micro_batch_size, s = seq_length; packed batches are one row, `[1, b*s]`.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.packing import pack_documents
from megatron_hybrid.data.windows import Windows


def build_iterator(
    dataset: Windows,
    config: RunConfig,
    *,
    consumed_samples: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[Batch]:
    """Micro-batches of one data-parallel rank, in order, from sample `consumed_samples` on.

    Args:
        dataset: the windows of a split.
        config: `training` batch sizes, `data.packed_documents`, `data.num_workers`.
        consumed_samples: samples that all ranks together have read before.
        data_parallel_rank: in `[0, data_parallel_size)`.
        data_parallel_size: must divide `global_batch_size / micro_batch_size`.

    Yields:
        `global_batch_size / (micro_batch_size * data_parallel_size)` batches a global batch.

    Raises:
        DataError: at the end of the data, or at an id outside the tokenizer's vocabulary.
    """
    training = config.training
    micro_batches = _MicroBatches(
        samples=len(dataset),
        consumed_samples=consumed_samples,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    loader: DataLoader[Tensor] = DataLoader(
        dataset,  # type: ignore[arg-type]  # torch asks for its base class, and uses none of it
        batch_sampler=micro_batches,
        collate_fn=_stack,
        num_workers=config.data.num_workers,
        # A forked worker starts in milliseconds and shares the parent's maps of the data.
        multiprocessing_context="fork" if config.data.num_workers else None,
        worker_init_fn=_ignore_signals,
        # Torch draws a seed for its workers, by default from the model's own random numbers.
        generator=torch.Generator(),
    )
    return _batches(loader, micro_batches, dataset, config.data.packed_documents)


def _batches(
    loader: DataLoader[Tensor], plan: "_MicroBatches", dataset: Windows, packed: bool
) -> Iterator[Batch]:
    has_cuda = torch.cuda.is_available()
    for rows in loader:
        highest = int(rows.max())
        if highest >= dataset.vocab_size:
            raise DataError(
                f"data.data_path holds the token id {highest}; the tokenizer has "
                f"{dataset.vocab_size} ids: the files were made with another tokenizer"
            )
        batch = _packed_batch(rows, dataset.eod) if packed else _plain_batch(rows)
        yield batch.pin_memory() if has_cuda else batch
    left = (plan.samples - plan.consumed_samples) % plan.global_batch_size
    raise DataError(
        f"the data ends here: {plan.samples} samples were planned, reading began at sample "
        f"{plan.consumed_samples}, and the {left} left are less than a global batch of "
        f"{plan.global_batch_size}; a longer run needs more training.train_iters, "
        "training.train_samples or training.train_tokens"
    )


def _plain_batch(rows: Tensor) -> Batch:
    """From windows `[b, s + 1]`."""
    samples, seq_length = rows.shape[0], rows.shape[1] - 1
    return Batch(
        tokens=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        loss_mask=torch.ones(samples, seq_length),
        position_ids=torch.arange(seq_length).repeat(samples, 1),
    )


def _packed_batch(rows: Tensor, eod: int) -> Batch:
    """From windows `[b, s + 1]`; one row of `b*s`."""
    tokens = rows[:, :-1].contiguous()
    packing = pack_documents(tokens, eod)
    return Batch(
        tokens=tokens.view(1, -1),
        labels=rows[:, 1:].reshape(1, -1),
        loss_mask=packing.loss_mask,
        position_ids=packing.position_ids,
        cu_seqlens=packing.cu_seqlens,
        max_seqlen=packing.max_seqlen,
        seq_idx=packing.seq_idx,
    )


@dataclass(frozen=True)
class _MicroBatches(Sampler[list[int]]):
    """The sample numbers of each micro-batch of one rank."""

    samples: int
    consumed_samples: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __iter__(self) -> Iterator[list[int]]:
        share, rest = divmod(self.global_batch_size, self.data_parallel_size)
        assert rest == 0 and share % self.micro_batch_size == 0, "the config's rules let this pass"
        last = self.samples - self.global_batch_size
        for batch in range(self.consumed_samples, last + 1, self.global_batch_size):
            first = batch + self.data_parallel_rank * share
            for micro in range(first, first + share, self.micro_batch_size):
                yield list(range(micro, micro + self.micro_batch_size))


def _stack(windows: Sequence[NDArray[np.int64]]) -> Tensor:
    """One tensor a micro-batch: handing a tensor over between processes costs more than filling
    it, so the rest of a batch is made where it is used."""
    return torch.from_numpy(np.stack(windows))


def _ignore_signals(worker: int) -> None:
    """Leave the run's signals to the trainer: a scheduler sends them to every process of a job,
    and a reader that ended early would take the last, orderly steps of the run with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
