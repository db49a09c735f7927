"""Packed documents: where they start, and which of them a token belongs to.

Shapes: b batch, l tokens. `seq_idx` [b, l] is any integer label; a document is a run of equal ones.
"""

import torch
from torch import Tensor


def starts_of_documents(seq_idx: Tensor) -> Tensor:
    """Bool [b, l]: True where a token's document differs from that of the token before it.

    False at the first token of a row, which may continue from an initial state.
    """
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    torch.ne(seq_idx[:, 1:], seq_idx[:, :-1], out=starts[:, 1:])
    return starts


def number_documents(seq_idx: Tensor) -> Tensor:
    """Int32 [b, l]: 0 for a row's first document, 1 for the next, and so on.

    Two tokens of a row share a document exactly if they share its number, which does not hold for
    labels that come back later in the row.
    """
    return starts_of_documents(seq_idx).cumsum(dim=1, dtype=torch.int32)


def after_prefix(seq_idx: Tensor, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row's documents, each after the row's first tokens, which belong to the first.

    Args:
        seq_idx: [1, l].
        prefix: how many tokens.

    Returns:
        For each token of the new row which of the old one it is [l'] int64, seq_idx of the new row
        [1, l'], and where in it the tokens of the old one are [l] int64.
    """
    number = number_documents(seq_idx)[0].long()
    others = int(number[-1])
    length = len(number) + others * prefix
    tokens = torch.arange(len(number), device=seq_idx.device)
    places = tokens + number * prefix
    taken = torch.arange(length, device=seq_idx.device)
    documents = taken.new_empty(length)
    starts = starts_of_documents(seq_idx)[0].nonzero()[:, 0]
    before = places[starts][:, None] - prefix + tokens[:prefix]
    taken[before] = tokens[:prefix].expand(others, -1)
    taken[places] = tokens
    documents[before] = number[starts][:, None].expand(-1, prefix)
    documents[places] = number
    return taken, documents[None].to(seq_idx.dtype), places
