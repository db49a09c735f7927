"""Losses of single tokens by the model's own forward pass, in any layout.

Each label of a batch says by a number into which sum its loss goes: a sum may be a source's, or one
token's. Ranks add up what is theirs, whichever way they divide model, sequences and batches.

Legend: b rows, s tokens of a row; packed batches are one row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.context_parallel import CONVOLVED_BEFORE
from megatron_hybrid.config.ranks import CP, TP, model_ranks
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.evaluation.windows import INTO, NOWHERE, Row, padded, rows_of
from megatron_hybrid.training.step import local_batch, packed_seq_params

_SORTED = 64  # micro batches whose rows are sorted by length, so that few of them are padded


class TokenLosses:
    """Sums of the losses of tokens.

    Args:
        config: of this model in its layout.
        chunks: this rank's, as built or as wrapped for training.
        backend: "torch" or "transformer_engine".
        rows: of a micro batch.
    """

    def __init__(
        self, config: RunConfig, chunks: Sequence[torch.nn.Module], backend: str, rows: int
    ) -> None:
        self._chunks, self._backend, self._rows = list(chunks), backend, rows
        self._device = next(chunks[0].parameters()).device
        self._schedule = get_forward_backward_func()
        self._metas = config.model.num_meta_tokens
        ranks = model_ranks(config)
        # Zigzag halves for each context parallel rank, of which sequence parallelism cuts each.
        self._multiple = 2 * ranks[CP] * ranks[TP]
        if ranks[CP] > 1 and config.parallel.mamba_cp_comm_type != "all_to_all":
            self._multiple *= CONVOLVED_BEFORE  # tokens of a chunk, at least
        # So that no stage of a pipeline waits for long.
        stages = config.parallel.pipeline_model_parallel_size
        self._at_once = 4 * stages if stages > 1 else 1
        self._sums = torch.zeros(0)

    def of(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The loss of every token of sequences but the first, given those before it.

        Every rank gives the same sequences and gets all losses.
        """
        rows: list[Row] = []
        size = 0
        for tokens in sequences:
            into = range(size, size + len(tokens) - 1)
            rows += rows_of(tokens, max(1, len(tokens) - 1), 0, into)
            size += max(0, len(tokens) - 1)
        losses = self.sums(iter(rows), size)[:, 0].tolist()
        found = iter(losses)
        return [list(islice(found, max(0, len(tokens) - 1))) for tokens in sequences]

    def sums(self, rows: Iterator[Row], size: int) -> Tensor:
        """The sums of the losses of rows' labels and their counts: `[size, 2]` float64.

        Args:
            rows: the same on every rank; each replica computes its share.
        """
        return self.sums_of_batches(self._batches(rows), size)

    @torch.no_grad()
    def sums_of_batches(self, calls: Iterator[list[Batch]], size: int) -> Tensor:
        """The same of micro batches of this rank, with the labels' sums as `extra["into"]`.

        Args:
            calls: micro batches of one shape, as many on every rank.
        """
        for chunk in self._chunks:
            chunk.eval()
        self._sums = torch.zeros(size, 2, dtype=torch.float64, device=self._device)
        for batches in calls:
            rows, length = batches[0].tokens.shape
            iterators = [iter(batches) for _ in self._chunks]
            self._schedule(
                forward_step_func=self._forward,
                data_iterator=iterators[0] if len(iterators) == 1 else iterators,
                model=self._chunks[0] if len(self._chunks) == 1 else self._chunks,
                num_microbatches=len(batches),
                seq_length=length + self._metas,
                micro_batch_size=rows,
                forward_only=True,
            )
        if parallel_state.get_tensor_model_parallel_rank() > 0:  # they all have the same
            self._sums.zero_()
        dist.all_reduce(self._sums)
        return self._sums

    def _forward(self, data: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        """The engine's forward_step_func."""
        batch = next(data)
        into = F.pad(batch.extra[INTO], (self._metas, 0), value=NOWHERE)
        batch = replace(batch.after(self._metas), extra={INTO: into})
        local = local_batch(batch, self._device)
        output = model(
            local.tokens,
            local.position_ids,
            None,
            labels=local.labels,
            packed_seq_params=packed_seq_params(batch, self._backend, self._device),
        )
        return output, partial(self._add, local.extra[INTO])

    def _add(self, into: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, s]` losses of the last stage, each into its sum."""
        counted = into != NOWHERE
        values = losses[counted].double()
        self._sums.index_add_(
            0, into[counted], torch.stack((values, values.new_ones(len(values)))).T
        )
        # What the schedule makes of a loss is of no account here.
        return losses.sum(), counted.sum().int(), losses.new_zeros(1)

    def _batches(self, rows: Iterator[Row]) -> Iterator[list[Batch]]:
        """This rank's micro batches of rows, whose order is that of their lengths."""
        replicas = parallel_state.get_data_parallel_world_size()
        replica = parallel_state.get_data_parallel_rank()
        in_call = self._rows * self._at_once * replicas
        while some := list(islice(rows, in_call * _SORTED)):
            some.sort(key=len, reverse=True)
            for first in range(0, len(some), in_call):
                together = some[first : first + in_call]
                length = -(-len(together[0]) // self._multiple) * self._multiple
                each = self._rows * replicas
                # As many on every rank: experts and stages wait for each other.
                yield [
                    padded(
                        together[at + replica * self._rows : at + (replica + 1) * self._rows],
                        self._rows if at or len(together) > each or replicas > 1 else len(together),
                        length,
                    )
                    for at in range(0, len(together), each)
                ]
