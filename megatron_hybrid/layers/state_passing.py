"""Context parallelism by states: each rank goes through its own two chunks of the sequence, and
what one chunk leaves to the next is sent on, in order of the text.

Of 2 * CP chunks in zigzag, rank r holds chunks r and 2 * CP - 1 - r: the states go up the ranks
through the first chunks and down again through the second ones, and their gradients the other way.
A rank sends at most two states and the ends of two chunks a pass, however long the sequence is and
however many ranks share it.

Legend: s sequence of this rank, q = s / 2 tokens of a chunk, l whole sequence, b batch; 2b rows:
the first chunks of all samples, then the second ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, batch_isend_irecv, irecv, isend, recv, send

from megatron_hybrid.layers.context_parallel import local_chunks
from megatron_hybrid.ops.segments import number_documents


def to_chunks(part: Tensor) -> Tensor:
    """`[s, b, ...]` in zigzag order -> `[2b, q, ...]`; a view for one sample."""
    return part.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)


def from_chunks(rows: Tensor) -> Tensor:
    """Back again: `[2b, q, ...]` -> `[s, b, ...]`."""
    return rows.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1)


class ChunkDocuments(NamedTuple):
    """The documents of this rank's chunks; nothing goes from one document to another.

    Attributes:
        seq_idx: `[2b, q]`.
        joined: bool `[2b, k]`: which of the k tokens before a chunk are of its first document.
        goes_on: bool `[2b]`: whether a chunk's last document goes on in the next chunk.
    """

    seq_idx: Tensor
    joined: Tensor
    goes_on: Tensor


def chunk_documents(seq_idx: Tensor, tokens: int, cp_group: ProcessGroup) -> ChunkDocuments:
    """Of the whole row `[b, l]`, what this rank's chunks and `tokens` before them need."""
    numbers, found = number_documents(seq_idx), []
    last = numbers.shape[1]
    for start, stop in local_chunks(last, cp_group):
        first = numbers[:, start : start + 1]
        joined = numbers.new_zeros(len(numbers), tokens, dtype=torch.bool)
        if start:
            joined = numbers[:, start - tokens : start] == first
        goes_on = torch.zeros_like(joined[:, 0])
        if stop < last:
            goes_on = numbers[:, stop] == numbers[:, stop - 1]
        found.append((numbers[:, start:stop], joined, goes_on))
    return ChunkDocuments(*(torch.cat(each) for each in zip(*found, strict=True)))


def inputs_before(
    rows: Tensor, tokens: int, documents: ChunkDocuments | None, cp_group: ProcessGroup
) -> Tensor:
    """The last `tokens` before each chunk, of its first document; zeros before the text.

    Args:
        rows: `[2b, q, c]`, q at least `tokens`.

    Returns:
        `[2b, tokens, c]`.
    """
    last = rows[:, -tokens:].unflatten(0, (2, -1)).contiguous()
    before: Tensor = _Before.apply(last, cp_group).flatten(0, 1)
    return before if documents is None else before * documents.joined[..., None]


def states_before(
    transfer: Tensor,
    added: Tensor,
    documents: ChunkDocuments | None,
    cp_group: ProcessGroup,
    *,
    matrices: bool = False,
) -> Tensor:
    """The state before each chunk, where one leaves `transfer` times the state before it + `added`.

    Args:
        transfer: `[2b, ...]`, of which dimensions of size one stand for all of `added`'s; with
            `matrices` it is multiplied with the state as a matrix.
        added: `[2b, ...]` in the computing dtype.

    Returns:
        `[2b, ...]` as `added`.
    """
    if documents is not None:
        goes_on = documents.goes_on.view(-1, *(1 for _ in added.shape[1:]))
        transfer, added = transfer * goes_on, added * goes_on
    transfer, added = (each.unflatten(0, (2, -1)) for each in (transfer, added))
    before: Tensor = _States.apply(transfer, added, cp_group, matrices)
    return before.flatten(0, 1)


def _exchanged(up: Tensor, down: Tensor, cp_group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """What the rank below sent up and the one above sent down; zeros where there is none."""
    rank, size = cp_group.rank(), cp_group.size()
    from_below, from_above = torch.zeros_like(up), torch.zeros_like(down)
    transfers = []
    for other, sent, got in ((rank - 1, down, from_below), (rank + 1, up, from_above)):
        if 0 <= other < size:
            transfers.append(P2POp(isend, sent, group=cp_group, group_peer=other))
            transfers.append(P2POp(irecv, got, group=cp_group, group_peer=other))
    for work in batch_isend_irecv(transfers):
        work.wait()
    return from_below, from_above


class _Before(torch.autograd.Function):
    """`[2, ...]`, the ends of a rank's chunks -> those of the chunks before them."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, cp_group: ProcessGroup) -> Tensor:
        ctx.cp_group = cp_group
        first, second = _exchanged(last[0], last[1], cp_group)
        if cp_group.rank() == cp_group.size() - 1:
            second = last[0]
        return torch.stack([first, second])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cp_group, grad = ctx.cp_group, grad.contiguous()
        second, first = _exchanged(grad[1], grad[0], cp_group)
        if cp_group.rank() == cp_group.size() - 1:
            first = grad[1]
        return torch.stack([first, second]), None


def _up_and_down(
    like: Tensor, through: Callable[[int, Tensor], Tensor], cp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """What reaches this rank on a way from rank 0 up to the last one, and down again.

    Args:
        like: what goes; zeros begin.
        through: (0 on the way up or 1 down, what reaches the rank) -> what it sends on.
    """
    rank, size = cp_group.rank(), cp_group.size()
    up = like.new_zeros(like.shape)  # in one piece, as what is sent must be
    if rank > 0:
        recv(up, group=cp_group, group_src=rank - 1)
    down = through(0, up).contiguous()
    if rank < size - 1:
        send(down, group=cp_group, group_dst=rank + 1)
        down = like.new_empty(like.shape)
        recv(down, group=cp_group, group_src=rank + 1)
    if rank > 0:
        send(through(1, down).contiguous(), group=cp_group, group_dst=rank - 1)
    return up, down


class _States(torch.autograd.Function):
    """`[2, ...]`: what each chunk does to the state -> the state before it."""

    @staticmethod
    def forward(
        ctx: Any, transfer: Tensor, added: Tensor, cp_group: ProcessGroup, matrices: bool
    ) -> Tensor:
        def through(place: int, state: Tensor) -> Tensor:
            product = transfer[place] @ state if matrices else transfer[place] * state
            return product + added[place]

        before = torch.stack(_up_and_down(added[0], through, cp_group))
        ctx.save_for_backward(transfer, before)
        ctx.cp_group, ctx.matrices = cp_group, matrices
        return before

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        transfer, before = ctx.saved_tensors

        # The last chunk of the text comes first; it is of rank 0, too.
        def through(place: int, of_after: Tensor) -> Tensor:
            chunk = transfer[1 - place]
            product = chunk.mT @ of_after if ctx.matrices else chunk * of_after
            return product + grad[1 - place]

        second, first = _up_and_down(grad[0], through, ctx.cp_group)
        of_after = torch.stack([first, second])
        if ctx.matrices:
            return of_after @ before.mT, of_after, None, None
        return (of_after * before).sum_to_size(transfer.shape), of_after, None, None
