"""The text, or the ids, of single documents."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import Facts, read_facts
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.shard import open_shard
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Document:
    """A document of an indexed file.

    Attributes:
        ids: `[n]`, with the end token if it has one.
        learnt: `[n]`, which of them are to be learnt; None: it is no conversation.
    """

    number: int
    ids: NDArray
    learnt: NDArray[np.bool_] | None = None

    def stretches(self) -> list[tuple[NDArray, bool]]:
        """Its ids in parts of which all, or none, are to be learnt."""
        assert self.learnt is not None
        cuts = np.flatnonzero(np.diff(self.learnt)) + 1
        parts = zip(np.split(self.ids, cuts), np.split(self.learnt, cuts), strict=True)
        return [(ids, bool(learnt[0])) for ids, learnt in parts if len(ids)]


def read_documents(prefix: Path, numbers: list[int]) -> list[Document]:
    """Documents of a pair by number, from 0.

    Raises:
        DataError: the pair cannot be opened, or has no such document.
    """
    shard = open_shard(prefix)
    bin_bytes = shard.tokens * shard.dtype.itemsize
    index = Index(prefix)
    places = [index.place(number) for number in numbers]
    documents = []
    for number, (offset, length) in zip(numbers, places, strict=True):
        if length < 0 or offset < 0 or offset + length * shard.dtype.itemsize > bin_bytes:
            raise DataError(
                f"{index.path} is damaged: document {number} would be {length} tokens at byte "
                f"{offset} of {bin_bytes}; `megatron-hybrid data verify` says more"
            )
        ids = np.fromfile(shard.bin_path, dtype=shard.dtype, count=length, offset=offset)
        learnt = None
        if shard.has_mask:
            first = offset // shard.dtype.itemsize
            learnt = np.fromfile(shard.mask_path, np.uint8, count=length, offset=first) > 0
        documents.append(Document(number, ids, learnt))
    return documents


def tokenizer_of(prefix: Path, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer that made a pair.

    Args:
        tokenizer: that is said to have made it; ids written as text need none.

    Raises:
        DataError: it is another one, or none was given.
    """
    facts = read_facts(prefix)
    if tokenizer is None:
        if facts is not None and facts.tokenizer.type == "null":
            return build_tokenizer("null", None, vocab_size=facts.tokenizer.vocab_size)
        known = f": {_described(facts)} made {prefix}" if facts is not None else ""
        raise DataError(f"to show text, give its --tokenizer-model, or --tokens for ids{known}")
    if facts is not None and tokenizer.fingerprint != facts.tokenizer.fingerprint:
        raise DataError(
            f"{prefix} was made with another tokenizer, {_described(facts)}, than the one given "
            f"({tokenizer.fingerprint[:12]}…)"
        )
    return tokenizer


def _described(facts: Facts) -> str:
    return f"{facts.tokenizer.type} with the fingerprint {facts.tokenizer.fingerprint[:12]}…"


def check_ids(document: Document, tokenizer: Tokenizer) -> None:
    """Raises DataError for an id that is not the tokenizer's."""
    ids = document.ids
    outside = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
    if len(outside):
        place = int(outside[0])
        raise DataError(
            f"document {document.number}, token {place}: id {ids[place]} is outside the "
            f"tokenizer's vocabulary (0 … {tokenizer.vocab_size - 1})"
        )


def as_text(document: Document, tokenizer: Tokenizer) -> str:
    """The text, without the end token at its end.

    Raises:
        DataError: an id is not the tokenizer's.
    """
    check_ids(document, tokenizer)
    ids = document.ids
    if len(ids) and ids[-1] == tokenizer.eod:
        ids = ids[:-1]
    return tokenizer.decode(ids.tolist())
