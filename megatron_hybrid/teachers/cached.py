"""A teacher whose answers were kept: read by what the samples are, while the student computes.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of this context
parallel rank, k kept tokens, v vocabulary of this tensor parallel rank.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.layers.kl_divergence import Divergence
from megatron_hybrid.layers.tail_divergence import Kept, vocab_parallel_tail_divergence
from megatron_hybrid.teachers.cache_block import Answers, BlockReader
from megatron_hybrid.teachers.cache_find import Finder
from megatron_hybrid.teachers.cache_spec import Block, Cache, CacheError, read_cache

if TYPE_CHECKING:
    from megatron_hybrid.objectives.distillation_options import Options

_OPEN = 64  # files


@dataclass(frozen=True)
class CachedAnswer:
    """What was kept, of the tokens of this rank."""

    kept: Kept

    def divergence(
        self, logits: Tensor, labels: Tensor, tp_group: dist.ProcessGroup, options: "Options"
    ) -> Divergence:
        """As `objectives.distillation.Answer` says."""
        return vocab_parallel_tail_divergence(
            logits, self.kept, labels, tp_group,
            forward_share=options.forward_share, temperature=options.temperature,
        )  # fmt: skip


class CacheReader:
    """Answers of a cache by place; files are mapped into memory, and the latest stay open."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.finder = cache, Finder(cache)
        self._open: OrderedDict[Path, BlockReader] = OrderedDict()

    def read(self, place: int) -> Answers:
        """The answers to a sample.

        Raises:
            CacheError: its file is not there or damaged.
        """
        part, sample = self.finder.part_of(place)
        return self._block(self.cache.block_of(part, sample)).read(sample, self.cache.spec)

    def _block(self, block: Block) -> BlockReader:
        path = self.cache.path(block)
        if path not in self._open:
            self._open[path] = BlockReader(path, self.cache.digest, block)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


class CachedTeacher:
    """The teacher of a run, as `distill cache` has kept it. Needs no other rank.

    Args:
        folder: of the answers.
        names: of the sources of the run's data.
    """

    def __init__(self, folder: Path, device: torch.device, names: Sequence[str]) -> None:
        self._reader = CacheReader(read_cache(folder))
        self._folder, self._device, self._names = folder, device, names
        self._is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self._threads = ThreadPoolExecutor(1, "cached teacher")
        self._read: dict[tuple[int, ...], Future[Kept]] = {}

    def look_ahead(self, micro_batches: Sequence[Batch], *, held_out: bool) -> None:
        """As `objectives.distillation.TeacherSource` says: reading begins."""
        for waiting in self._read.values():
            waiting.cancel()
        self._read = {}
        for batch in micro_batches if self._is_last_stage else ():
            assert batch.samples is not None
            self._read[batch.samples] = self._threads.submit(self._of, batch)

    def answer(self, samples: tuple[int, ...]) -> CachedAnswer:
        """As `objectives.distillation.TeacherSource` says; of each micro batch once.

        Raises:
            CacheError: it is damaged, or not there.
        """
        kept = self._read.pop(samples).result()
        local = get_batch_on_this_cp_rank(
            dict(zip(Kept._fields, kept, strict=True)),
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        found = (each.to(self._device, non_blocking=True) for each in local.values())
        return CachedAnswer(Kept(*(each.transpose(0, 1) for each in found)))

    def _of(self, batch: Batch) -> Kept:
        """Of the whole row, `[b, s, k]` and `[b, s]`."""
        answers = [self._reader.read(place) for place in self._places(batch)]
        spec, shape = self._reader.cache.spec, batch.tokens.shape

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.stack([getattr(each, name) for each in answers]))

        values = joined("values")
        if spec.dtype == "bf16":
            values = values.view(torch.bfloat16)
        ids, log_sum = joined("ids"), joined("log_sum")
        log_p = (values.double() / spec.temperature - log_sum[..., None]).float()
        log_p.masked_fill_(ids < 0, -torch.inf)
        return Kept(
            ids.view(*shape, -1), log_p.view(*shape, -1),
            joined("log_tail").view(shape), joined("loss").view(shape),
        )  # fmt: skip

    def _places(self, batch: Batch) -> list[int]:
        assert batch.samples is not None and batch.sources is not None
        assert batch.offsets is not None
        length = batch.tokens.numel() // len(batch.samples)
        found = self._reader.finder.guess(
            self._names, np.array(batch.samples), np.array(batch.sources), np.array(batch.offsets),
            length,
        )  # fmt: skip
        if (found < 0).any():
            at = int((found < 0).argmax())
            raise CacheError(
                f"{self._folder} lacks sample {batch.samples[at]}: {length} tokens from token "
                f"{batch.offsets[at]} of {self._names[batch.sources[at]]} on"
            )
        return [int(each) for each in found]
