"""Whether the columns of an `.idx` fit each other."""

from dataclasses import dataclass

import numpy as np

from megatron_hybrid.data.index import Index
from megatron_hybrid.data.inspection.verdict import Verdict, Wrong


@dataclass(frozen=True)
class IndexSums:
    """What the lengths of an index amount to.

    Attributes:
        tokens: of all documents.
        longest: length of the longest document in tokens.
        shortest: likewise; where it is below 0, documents have no places.
    """

    tokens: int
    longest: int
    shortest: int


def check_index(index: Index, verdict: Verdict) -> IndexSums:
    """Read an index to its end; what is wrong goes into the verdict."""
    first, end = 0, 0  # of the block: its first document, and the token at which that begins
    longest, shortest = 0, np.iinfo(np.int32).max
    bad_lengths, bad_offsets = Wrong(), Wrong()
    for lengths, offsets in zip(index.lengths(), index.offsets(), strict=True):
        ends = end + np.cumsum(lengths, dtype=np.int64)
        begins = (ends - lengths) * index.dtype.itemsize
        i = bad_lengths.add(lengths < 0)
        if i is not None:
            bad_lengths.text = f"{index.path}: document {first + i} has {lengths[i]} tokens"
        i = bad_offsets.add(offsets != begins)
        if i is not None:
            bad_offsets.text = (
                f"{index.path}: document {first + i} begins at byte {offsets[i]} by its offset, "
                f"at {begins[i]} by the lengths before it"
            )
        longest, shortest = max(longest, int(lengths.max())), min(shortest, int(lengths.min()))
        first, end = first + len(lengths), int(ends[-1])
    bad_lengths.report(verdict)
    bad_offsets.report(verdict)
    _check_marks(index, verdict)
    return IndexSums(end, longest, shortest)


def _check_marks(index: Index, verdict: Verdict) -> None:
    """Marks rise from 0 to the count; not always by 1: Megatron-LM can cut documents into parts."""
    first, before = 0, -1
    bad_marks = Wrong()
    for marks in index.marks():
        wrong = np.diff(marks, prepend=before) <= 0
        if first == 0:
            wrong[0] = marks[0] != 0
        i = bad_marks.add(wrong)
        if i is not None:
            bad_marks.text = (
                f"{index.path}: document mark {first + i} is {marks[i]}; marks must rise from 0 "
                f"to {index.documents}"
            )
        first, before = first + len(marks), int(marks[-1])
    bad_marks.report(verdict)
    if before != index.documents:
        verdict.problems.append(
            f"{index.path}: the last document mark is {before}; it must be {index.documents}"
        )
