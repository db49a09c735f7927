"""Opening a shard, one `.bin`/`.idx` pair, by its sizes alone: a few small reads at any length.

What the ends of the index say is held against the size of the `.bin` and against the facts beside
it. Contents are not read: `megatron-hybrid data verify` compares checksums.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import Facts, facts_path, read_facts
from megatron_hybrid.data.indexed import HEADER_BYTES, indexed_paths, mask_path, read_header

# Of a `.bin` without facts, for its digest.
_SAMPLES, _SAMPLE_BYTES = 4, 4096


@dataclass(frozen=True)
class Shard:
    """An opened and checked `.bin`/`.idx` pair.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        dtype: of the ids in the `.bin`, uint16 or int32, little-endian.
        tokens: in the `.bin`.
        digest: hex, of the count of tokens and the checksums that the facts give for the `.bin` and
            the `.mask`; without facts, of the size and the first and last entries of the `.idx` and
            some bytes of the `.bin`. Paths have no part in it, so data may move.
        older_digest: what plans have for it that were made before those bytes were part of it.
        facts: what is recorded beside it; None: nothing.
        file: device and inode of the `.bin`, the same for all its paths and links.
        sequences: in the `.idx`.
        documents: of one sequence or more each.
        idx_bytes: size of the `.idx`.
    """

    prefix: Path
    dtype: np.dtype[Any]
    tokens: int
    digest: str
    older_digest: str
    facts: Facts | None
    file: tuple[int, int]
    sequences: int
    documents: int
    idx_bytes: int

    @property
    def fingerprint(self) -> str | None:
        """Of the tokenizer that made it; None: there are no facts."""
        return None if self.facts is None else self.facts.tokenizer.fingerprint

    @property
    def has_end_tokens(self) -> bool:
        """Whether every document is known to end with the tokenizer's end token."""
        return self.facts is not None and self.facts.append_eod

    @property
    def has_mask(self) -> bool:
        """Whether its documents are conversations, of whose tokens some are to be learnt."""
        return self.facts is not None and self.facts.mask is not None

    @property
    def looks_masked(self) -> bool:
        """Whether it has a mask, or one for as many tokens lies beside it, whose facts are gone."""
        if self.facts is not None:
            return self.has_mask
        return self.mask_path.is_file() and self.mask_path.stat().st_size == self.tokens

    @property
    def bin_path(self) -> Path:
        """The file of its ids."""
        return indexed_paths(self.prefix)[0]

    @property
    def mask_path(self) -> Path:
        """The file that says which of them are to be learnt, where `looks_masked`."""
        return mask_path(self.prefix)


def open_shard(prefix: Path) -> Shard:
    """Open a pair and check that its files are whole and belong together by size.

    Raises:
        DataError: a file is missing, cut short, of another format, or they disagree.
    """
    bin_path, idx_path = indexed_paths(prefix)
    try:
        with idx_path.open("rb", buffering=0) as file:
            dtype, sequences = read_header(file, idx_path)
            lengths_at = file.tell()
            ends = _last_entries(file.fileno(), lengths_at, sequences)
            header = os.pread(file.fileno(), lengths_at, 0)
            idx_bytes = os.fstat(file.fileno()).st_size
        found = bin_path.stat()
        facts = read_facts(prefix)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    bin_bytes, real_file = found.st_size, (found.st_dev, found.st_ino)
    last_length, last_offset = struct.unpack("<iq", ends)
    promised = last_offset + last_length * dtype.itemsize
    if bin_bytes != promised:
        raise DataError(
            f"{bin_path} has {bin_bytes} bytes; {idx_path.name} describes {promised}: the two are "
            "not from one run, or one was cut short"
        )
    tokens = bin_bytes // dtype.itemsize
    if facts is None:
        content = header + ends + struct.pack("<q", idx_bytes)
        older_digest = hashlib.sha256(content).hexdigest()
        digest = hashlib.sha256(content + _some_bytes(bin_path)).hexdigest()
    else:
        sums = [facts.bin.sha256, *([facts.mask.sha256] if facts.mask is not None else [])]
        digest = hashlib.sha256(" ".join([str(tokens), *sums]).encode()).hexdigest()
        older_digest = digest
        _compare(prefix, facts, bin=bin_bytes, idx=idx_bytes, dtype=dtype, documents=sequences)
        _check_mask(prefix, facts, tokens)
    marks = (idx_bytes - HEADER_BYTES - 12 * sequences) // 8
    return Shard(
        prefix, dtype, tokens, digest, older_digest, facts, real_file, sequences,
        max(0, marks - 1), idx_bytes,
    )  # fmt: skip


def _last_entries(descriptor: int, lengths_at: int, sequences: int) -> bytes:
    """The last length (i32) and the last offset (i64) of an `.idx`; zeros where it has none."""
    if not sequences:
        return bytes(12)
    offsets_at = lengths_at + 4 * sequences
    return os.pread(descriptor, 4, offsets_at - 4) + os.pread(
        descriptor, 8, offsets_at + 8 * sequences - 8
    )


def _some_bytes(path: Path) -> bytes:
    """From places all over a file, enough to tell it from another of its size."""
    try:
        with path.open("rb", buffering=0) as file:
            last = max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES)
            places = sorted({last * place // (_SAMPLES - 1) for place in range(_SAMPLES)})
            return b"".join(os.pread(file.fileno(), _SAMPLE_BYTES, place) for place in places)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _compare(
    prefix: Path, facts: Facts, *, bin: int, idx: int, dtype: np.dtype[Any], documents: int
) -> None:
    """Raises DataError where the facts are of other files than the pair beside them."""
    found = {
        "bin.bytes": (bin, facts.bin.bytes),
        "idx.bytes": (idx, facts.idx.bytes),
        "dtype": (dtype.name, facts.dtype),
        "documents": (documents, facts.documents),
        "tokens": (bin // dtype.itemsize, facts.tokens),
    }
    wrong = [
        f"{name} is {said}, the files have {is_}"
        for name, (is_, said) in found.items()
        if is_ != said
    ]
    if wrong:
        raise DataError(f"{facts_path(prefix)} is of other files: {'; '.join(wrong)}")


def _check_mask(prefix: Path, facts: Facts, tokens: int) -> None:
    """Raises DataError where the facts speak of a mask, and there is none for these tokens."""
    if facts.mask is None:
        return
    path = mask_path(prefix)
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not found == facts.mask.bytes == tokens:
        raise DataError(
            f"{path} has {found} bytes, {facts_path(prefix).name} says {facts.mask.bytes}; it must "
            f"have one for each of the {tokens} tokens"
        )
