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
