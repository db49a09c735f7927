"""A worker of `distill cache`: block after block that nobody else makes, by the teacher's forward.

Workers need not know of each other: who makes a block claims it (`megatron_hybrid.claim`), and a
block of a worker that is gone is made anew. What is computed together is a function of the block,
so that a block has the same bytes whoever makes it, in one layout and with one micro batch size.

Legend: b samples of a micro batch, s tokens of this context parallel rank, S of the whole sample, k
kept tokens, v vocabulary of this tensor parallel rank.
"""

import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_hybrid.claim import CLAIM_FILE, ClaimedError, claimed, refuse_if_lost
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.datasets import open_windows
from megatron_hybrid.data.loader import read_batch
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import file_errors
from megatron_hybrid.human import say
from megatron_hybrid.layers.tail_divergence import keep
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import resolve_backend
from megatron_hybrid.platform.imports import importing
from megatron_hybrid.teachers.cache_block import Answers, BlockWriter, encode
from megatron_hybrid.teachers.cache_open import Opened, begin
from megatron_hybrid.teachers.cache_spec import Block, Cache
from megatron_hybrid.training.distributed import process_groups, select_device

logger = logging.getLogger(__name__)
_TOLD_S = 10.0


def make_answers(opened: Opened) -> None:
    """Make the blocks that are missing and that nobody else makes; every rank calls it.

    Raises:
        UserError: the teacher cannot be loaded, a file cannot be read or written.
    """
    select_device()
    platform, backend = initialize(), resolve_backend(opened.config.backend)
    with process_groups(opened.config, platform):
        work(opened, backend, platform.device)


def work(opened: Opened, backend: str, device: torch.device) -> None:
    """As `make_answers`, within the process groups."""
    with importing():
        from megatron_hybrid.teachers.live import LiveTeacher

    cache, speaks = opened.cache, dist.get_rank() == 0
    if speaks:
        with file_errors(cache.folder):
            begin(cache)
    maker: _Maker | None = None
    for block in _agreed(_free(cache, list(cache.blocks())) if speaks else None):
        if maker is None:  # nothing is loaded for nothing
            teacher = LiveTeacher(opened.config, opened.teacher, backend, device, offload=False)
            maker = _Maker(opened, teacher, device)
        maker.make(block)


def _agreed(blocks: Iterator[Block] | None) -> Iterator[Block]:
    """What rank 0 takes, on every rank."""
    while True:
        told: list[Any] = [None, None]
        if blocks is not None:
            try:
                told[0] = next(blocks, None)
            except UserError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise UserError(told[1])
        if told[0] is None:
            return
        yield told[0]


def _free(cache: Cache, blocks: Sequence[Block]) -> Iterator[Block]:
    """Blocks to make, each claimed until the next is asked for. Tells how far all workers are."""
    told, shown = _Progress(cache, blocks), 0.0
    waiting: list[Block] = []
    for block in told.in_order():
        path = cache.path(block)
        if _claim(path).exists():
            waiting.append(block)  # somebody's, alive or not; looked at again in the end
        elif path.exists():
            told.done(block, own=False)
        else:
            waiting += yield from _take(cache, block, told)
        if time.monotonic() - shown > _TOLD_S:
            told.say()
            shown = time.monotonic()
    others = 0
    for block in waiting:
        others += len((yield from _take(cache, block, told)))
    told.say(last=True)
    if others:
        say(f"{others} blocks are being made by other workers")


def _take(cache: Cache, block: Block, told: "_Progress") -> Generator[Block, None, Sequence[Block]]:
    """A block, claimed for the while that it is made; returned where somebody else makes it."""
    path = cache.path(block)
    try:
        with claimed([_claim(path)], f"distill cache, {path.name},"):
            own = not path.exists()
            if own:
                yield block
            told.done(block, own=own)
    except ClaimedError:
        return [block]
    return []


def _claim(path: Path) -> Path:
    return path.with_name(f".{path.name}{CLAIM_FILE}")


class _Progress:
    """Tokens that are done, by this worker and by all."""

    def __init__(self, cache: Cache, blocks: Sequence[Block]) -> None:
        self._blocks, self._total = blocks, cache.tokens
        self._done = self._own = 0
        self._since = time.monotonic()

    def in_order(self) -> Iterator[Block]:
        """Tasks of a Slurm array begin apart from each other."""
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        tasks = os.environ.get("SLURM_ARRAY_TASK_COUNT", "")
        start = 0
        if task.isdigit() and tasks.isdigit() and int(tasks):
            start = len(self._blocks) * (int(task) % int(tasks)) // int(tasks)
        yield from self._blocks[start:]
        yield from self._blocks[:start]

    def done(self, block: Block, *, own: bool) -> None:
        tokens = (block.end_sample - block.first_sample) * block.seq_length
        self._done += tokens
        self._own += tokens if own else 0

    def say(self, *, last: bool = False) -> None:
        text = f"{self._done:,} of {self._total:,} tokens have answers"
        speed = self._own / max(time.monotonic() - self._since, 1e-9)
        if self._own:
            text += f"; {speed:,.0f} tokens/s here"
        if self._own and not last and self._done < self._total:
            text += f", at which the rest takes {(self._total - self._done) / speed / 3600:,.1f} h"
        say(text)


class _Maker:
    """Makes blocks. Ranks make it, and call it, together."""

    def __init__(self, opened: Opened, teacher: Any, device: torch.device) -> None:
        self._opened, self._teacher, self._device = opened, teacher, device
        train, valid = open_windows(opened.config, opened.tokenizer, opened.data)
        self._windows = {"train": train, "valid": valid}
        self._digest = opened.cache.digest
        self._replicas = parallel_state.get_data_parallel_world_size()
        self._replica = parallel_state.get_data_parallel_rank()
        self._speaks = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        stages = opened.config.parallel.pipeline_model_parallel_size
        self._at_once = 4 * stages if stages > 1 else 1

    def make(self, block: Block) -> None:
        """One block's file."""
        path, writer = self._opened.cache.path(block), None
        if dist.get_rank() == 0:
            with file_errors(path):
                writer = BlockWriter(path, self._digest, block)
        try:
            for rows in self._rows(block):
                for row in rows if writer is not None else ():
                    with file_errors(path):
                        writer.add(row)  # type: ignore[union-attr]
            if writer is not None:
                refuse_if_lost(_claim(path))
                with file_errors(path):
                    writer.publish()
        finally:
            if writer is not None:
                with suppress(OSError):
                    writer.discard()

    def _rows(self, block: Block) -> Iterator[list[bytes]]:
        """Rows of samples, in order, on rank 0; elsewhere nothing is in them."""
        size = self._opened.config.training.micro_batch_size
        each = size * self._replicas
        firsts = range(block.first_sample, block.end_sample, each)
        for start in range(0, len(firsts), self._at_once):
            batches = [
                self._batch(block, first + self._replica * size, size)
                for first in firsts[start : start + self._at_once]
            ]
            self._teacher.look_ahead(batches, held_out=False)
            for first, batch in zip(firsts[start:], batches, strict=False):
                yield self._gathered(block, first, self._answers(batch), size)

    def _batch(self, block: Block, first: int, size: int) -> Batch:
        """A micro batch of a replica; beyond the end of a block, its last sample again."""
        windows: Windows | None = self._windows[block.part]
        assert windows is not None
        samples = [min(first + number, block.end_sample - 1) for number in range(size)]
        batch = read_batch(windows, samples, self._opened.config)
        # Which tokens of the row this rank has.
        places = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
        # Samples that occur twice are one to whoever asks for the answer.
        return _with_places(batch, places, first)

    @torch.no_grad()
    def _answers(self, batch: Batch) -> dict[str, Any] | None:
        """What this rank has of a micro batch's."""
        from megatron_hybrid.training.step import local_batch

        spec = self._opened.cache.spec
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return None
        logits = self._teacher.answer(batch.samples).logits
        local = local_batch(batch, self._device)
        found = keep(
            logits, local.labels.t(), spec.top_k, parallel_state.get_tensor_model_parallel_group(),
            words=spec.vocab_size, temperature=spec.temperature, top_p=spec.top_p,
            min_k=spec.min_k,
        )  # fmt: skip
        if not self._speaks:
            return None
        ids, values, log_sum, log_tail, loss = (each.transpose(0, 1).cpu() for each in found)
        values = values.bfloat16().view(torch.uint16) if spec.dtype == "bf16" else values.float()
        tensors = {
            "ids": ids, "values": values, "log_sum": log_sum, "log_tail": log_tail, "loss": loss
        }  # fmt: skip
        return {
            "replica": self._replica, "at": local.extra["at"][0].cpu().numpy(),
            **{name: each.contiguous().numpy() for name, each in tensors.items()},
        }  # fmt: skip

    def _gathered(
        self, block: Block, first: int, own: dict[str, Any] | None, size: int
    ) -> list[bytes]:
        """Rows of the samples of all replicas, on rank 0."""
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, found)
        rows: list[bytes] = []
        for replica in range(self._replicas if found is not None else 0):
            parts = [each for each in found or () if each and each["replica"] == replica]
            begin = first + replica * size
            for answers in _samples(parts, size)[: max(0, block.end_sample - begin)]:
                rows.append(encode(answers, self._opened.cache.spec))
        return rows


def _with_places(batch: Batch, places: torch.Tensor, first: int) -> Batch:
    assert batch.samples is not None
    names = tuple(first + number for number in range(len(batch.samples)))
    return replace(batch, samples=names, extra={"at": places})


def _samples(parts: Sequence[dict[str, Any]], size: int) -> list[Answers]:
    """Answers a sample, of the parts that context parallel ranks have of a micro batch."""
    rows, total = len(parts[0]["ids"]), sum(len(each["at"]) for each in parts)
    whole = {}
    for name in ("ids", "values", "log_sum", "log_tail", "loss"):
        first = parts[0][name]
        array = np.empty((rows, total, *first.shape[2:]), first.dtype)
        for each in parts:
            array[:, each["at"]] = each[name]
        # Packed, all samples are in one row.
        whole[name] = array.reshape(size, rows * total // size, *first.shape[2:])
    return [
        Answers(**{name: each[number] for name, each in whole.items()}) for number in range(size)
    ]
