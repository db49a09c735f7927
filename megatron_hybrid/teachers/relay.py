"""Micro batches to a teacher in a layout of its own, and hidden states of them back.

A global batch is G micro batches of the student's replicas, one replica's after the other's. The
teacher's replicas take as many each, and begin anew where they do not divide. Of each micro batch,
the ranks of the teacher's last stage hold some tokens, and those of the student's last stage want
some.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of the whole row, h
hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_hybrid.data.batch import Batch


class Place(NamedTuple):
    """A rank in a layout: where it stands along each dimension, and of how many.

    Attributes:
        last: whether it is of the last pipeline stage.
    """

    replica: int
    replicas: int
    context: int
    contexts: int
    tensor: int
    tensors: int
    last: bool


def place() -> Place:
    """This rank's, in the layout in force."""
    return Place(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )


class Relay:
    """Between a student's layout and its teacher's. All ranks make it and call it together.

    Args:
        student: this rank's place in the student's layout.
        teacher: in the teacher's, which is in force.
        split: whether the teacher's tensor parallel ranks hold parts of the sequence.
    """

    def __init__(
        self, student: Place, teacher: Place, device: torch.device, *, split: bool
    ) -> None:
        places: list[tuple[Place, Place]] = [(student, teacher)] * dist.get_world_size()
        dist.all_gather_object(places, (student, teacher))
        self._students = [each for each, _ in places]
        self._teachers = [each for _, each in places]
        self._rank, self._device, self._split = dist.get_rank(), device, split
        self._same_replicas = all(a.replica == b.replica for a, b in places)

    def shared(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """The micro batches of this rank's replica of the teacher.

        Args:
            micro_batches: of its replica of the student.
        """
        if self._same_replicas:
            return list(micro_batches)
        # What the model reads, without what an objective may have added.
        plain = [replace(batch, extra={}) for batch in micro_batches]
        everyones: list[list[Batch]] = [plain] * dist.get_world_size()
        dist.all_gather_object(everyones, plain)
        whole = {
            each.replica: batches for each, batches in zip(self._students, everyones, strict=True)
        }
        in_order = [batch for replica in sorted(whole) for batch in whole[replica]]
        taken = self._taken(len(in_order))[self._teachers[self._rank].replica]
        return [in_order[number % len(in_order)] for number in taken]

    def returned(
        self,
        hidden: Sequence[Tensor],
        micro_batches: Sequence[Batch],
        width: int,
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Last hidden states of the micro batches of this rank's replica of the student.

        Args:
            hidden: those of `shared`, as the teacher has them on its last stage; elsewhere none.
            width: h.

        Returns:
            On ranks of the student's last stage, `[s / CP, b, h]` each, as its tokens are cut.
        """
        me, each = self._students[self._rank], len(micro_batches)
        samples, length = micro_batches[0].tokens.shape
        mine = _tokens(me, length)
        size = (len(mine) if me.last else 0, samples, width)
        found = [torch.empty(size, dtype=dtype, device=self._device) for _ in micro_batches]
        at = torch.empty(length, dtype=torch.long)
        at[mine] = torch.arange(len(mine))
        for round_, numbers in enumerate(zip(*self._taken(each * me.replicas), strict=True)):
            # What each rank sends to each other one, of the micro batch that its replica has run.
            sent = [
                self._passed(self._rank, to, numbers, each, length)
                for to in range(len(self._students))
            ]
            come = [
                self._passed(of, self._rank, numbers, each, length)
                for of in range(len(self._students))
            ]
            whole = self._own_rows(hidden[round_]) if hidden else None
            parts = [whole[rows] for rows, _ in sent if whole is not None and len(rows)]
            received = self._exchange(
                parts, [len(rows) for rows, _ in sent], [len(rows) for rows, _ in come],
                (samples, width), dtype,
            )  # fmt: skip
            for of, ((_, tokens), rows) in enumerate(zip(come, received, strict=True)):
                if len(tokens):
                    number = numbers[self._teachers[of].replica]
                    found[number - me.replica * each][at[tokens]] = rows
        return found

    def _passed(
        self, of: int, to: int, numbers: Sequence[int], each: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """What a rank sends to another one: which of its rows, and which tokens they are."""
        sender, receiver = self._teachers[of], self._students[to]
        number = numbers[sender.replica]
        none = torch.empty(0, dtype=torch.long)
        if not (sender.last and receiver.last) or number // each != receiver.replica:
            return none, none
        tokens = _tokens(sender, length).tensor_split(sender.tensors)[sender.tensor]
        rows = torch.isin(tokens, _tokens(receiver, length)).nonzero()[:, 0]
        return rows, tokens[rows]

    def _own_rows(self, hidden: Tensor) -> Tensor:
        """Those of hidden states that this rank sends: tensor parallel ranks share the work."""
        own = self._teachers[self._rank]
        return hidden if self._split else hidden.tensor_split(own.tensors)[own.tensor]

    def _exchange(
        self,
        parts: Sequence[Tensor],
        sent: Sequence[int],
        come: Sequence[int],
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> Sequence[Tensor]:
        """Rows `[b, h]` to and from every rank, `sent` and `come` of them, as bytes."""
        empty = torch.empty(0, *shape, dtype=dtype, device=self._device)
        outgoing = torch.cat([empty, *parts]).flatten(1).view(torch.uint8)
        incoming = outgoing.new_empty(sum(come), outgoing.shape[1])
        dist.all_to_all_single(incoming, outgoing, list(come), list(sent))
        return incoming.view(dtype).view(-1, *shape).split(list(come))

    def _taken(self, total: int) -> list[range]:
        """By replica of the teacher, the numbers of the micro batches that it takes: those from
        `total` on are taken a second time, so that all have as many."""
        replicas = self._teachers[0].replicas
        each = -(-total // replicas)
        return [range(replica * each, (replica + 1) * each) for replica in range(replicas)]


def _tokens(place: Place, length: int) -> Tensor:
    """The tokens of a row that a context parallel rank has, in its order: two of 2 * CP chunks."""
    if place.contexts == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * place.contexts, -1)
    return chunks[[place.context, 2 * place.contexts - 1 - place.context]].flatten()
