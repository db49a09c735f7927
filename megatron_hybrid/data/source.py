"""A source of tokens: one or more shards, read as one long row of ids."""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config.token_files import prefixes
from megatron_hybrid.data.document_starts import DocumentStarts
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.open_files import OpenFiles
from megatron_hybrid.data.shard import Shard, open_shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A named body of tokens.

    Attributes:
        name: as in the config.
        shards: in the order in which they are read as one.
        files: what it has open; sources may share it.
    """

    name: str
    shards: tuple[Shard, ...]
    files: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard.tokens for shard in self.shards))

    def read(self, offset: int, out: NDArray[np.int64]) -> None:
        """Fill `out` `[n]` with the ids from token `offset` on, across shards.

        Raises:
            DataError: a file cannot be read, or has another size than when it was opened.
        """
        for shard, first, count, place in self._pieces(offset, len(out)):
            out[place : place + count] = self._read_shard(shard, first, count)

    def mask(self, offset: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` tokens from `offset` on are to be learnt, by the shards' masks.

        Raises:
            DataError: as `read`.
        """
        found = np.empty(count, dtype=np.uint8)
        for shard, first, here, place in self._pieces(offset, count):
            part = memoryview(found)[place : place + here]
            self.files.read(shard.mask_path, shard.tokens, first, part)
        return found.astype(np.bool_)

    def share(self, begin: Fraction, end: Fraction) -> tuple[int, int]:
        """The tokens between two shares of it, of which windows and their last labels are."""
        return math.floor(self.tokens * begin), math.floor(self.tokens * end)

    def document_ends(self, offset: int, count: int) -> list[int]:
        """Which of `count` tokens from `offset` on are the last of a document, by the files' index.

        Documents that end with an end token, as a shard's facts say, show it, and are left out.

        Raises:
            DataError: an index cannot be read, or has another size than when it was opened.
        """
        found: list[int] = []
        for shard, first, here, place in self._pieces(offset, count):
            if not shard.has_end_tokens:
                ends = DocumentStarts(shard, self.files).ends(first, here)
                found += [place + token - first for token in ends]
        return found

    def describe(self, token: int) -> str:
        """Where a token is, for a message: source, file, document, and byte."""
        number = bisect_right(self._ends, token)
        shard = self.shards[number]
        place = token - (self._ends[number] - shard.tokens)
        return f"source {self.name}: {Index(shard.prefix).describe(place)}"

    def _pieces(self, offset: int, count: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Where tokens are: shard, the first of them in it, how many, and their place among all."""
        number, done = bisect_right(self._ends, offset), 0
        assert offset >= 0 and offset + count <= self._ends[-1]
        while done < count:
            shard, end = self.shards[number], self._ends[number]
            first = offset + done - (end - shard.tokens)
            here = min(count - done, shard.tokens - first)
            yield shard, first, here, done
            number, done = number + 1, done + here

    def _read_shard(self, shard: Shard, first: int, count: int) -> NDArray[Any]:
        """Ids `[first, first + count)` of a shard."""
        ids = np.empty(count, dtype=shard.dtype)
        itemsize = shard.dtype.itemsize
        size, at = shard.tokens * itemsize, first * itemsize
        self.files.read(shard.bin_path, size, at, memoryview(ids).cast("B"))
        return ids


def open_sources(
    paths: Mapping[str, Sequence[str]], fingerprint: str | None = None, eod: int | None = None
) -> dict[str, Source]:
    """Open sources and check that their files are whole, distinct and of one tokenizer.

    Args:
        paths: for each source by name, prefixes or globs of prefixes. The shards of a source are
            sorted by path.
        fingerprint: of the run's tokenizer; None: any, the same for all.
        eod: its end token; None: any.

    Raises:
        DataError: with every file that is missing, damaged, named twice or of another tokenizer.
    """
    problems: list[str] = []
    sources = {}
    opened: list[tuple[str, Shard]] = []
    files = OpenFiles()
    owners: dict[tuple[int, int], str] = {}  # by Shard.file
    for name, patterns in paths.items():
        shards = []
        for prefix in _prefixes(name, patterns, problems):
            try:
                shard = open_shard(prefix)
            except DataError as error:
                problems.append(f"source {name}: {error}")
                continue
            if shard.file in owners:
                problems.append(
                    f"source {name}: {shard.bin_path} is a file that source {owners[shard.file]} "
                    f"has already ({shard.bin_path.resolve()}); its text would be read twice"
                )
            owners.setdefault(shard.file, name)
            shards.append(shard)
        if fingerprint is not None:
            problems += _foreign_shards(name, shards, fingerprint)
        opened += [(name, shard) for shard in shards]
        _note_unlike(name, shards)
        if eod is not None:
            problems += _foreign_ends(name, shards, eod)
        sources[name] = Source(name, tuple(shards), files)
    if fingerprint is None:
        problems += _of_several_tokenizers(opened)
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _of_several_tokenizers(opened: Sequence[tuple[str, Shard]]) -> list[str]:
    """The problems of shards that another tokenizer made than the first one that says its own."""
    said = [(name, shard.prefix, own) for name, shard in opened if (own := shard.fingerprint)]
    return [
        f"source {name}: {prefix} was made with another tokenizer (fingerprint {own[:12]}) than "
        f"{said[0][1]} ({said[0][2][:12]})"
        for name, prefix, own in said
        if own != said[0][2]
    ]


def _prefixes(name: str, patterns: Sequence[str], problems: list[str]) -> list[Path]:
    """The prefixes of a source, sorted; patterns that match nothing are problems."""
    found: list[Path] = []
    for pattern in patterns:
        matches = prefixes(pattern)
        if not matches:
            problems.append(
                f"source {name}: {pattern} matches no token files; it must match prefixes, the "
                "paths of token files without .bin and .idx"
            )
        found += map(Path, matches)
    return sorted(found)


def _foreign_shards(name: str, shards: Sequence[Shard], fingerprint: str) -> list[str]:
    """The problems of shards that another tokenizer made; a log line for those that don't say."""
    unknown = sum(shard.fingerprint is None for shard in shards)
    if unknown:
        logger.info(
            "source %s: %d of %d shards have no facts (.meta.json), so that their tokenizer "
            "cannot be checked",
            *(name, unknown, len(shards)),
        )
    return [
        f"source {name}: {shard.prefix} was made with another tokenizer (fingerprint "
        f"{shard.fingerprint[:12]}) than data.tokenizer_model ({fingerprint[:12]})"
        for shard in shards
        if shard.fingerprint is not None and shard.fingerprint != fingerprint
    ]


def _note_unlike(name: str, shards: Sequence[Shard]) -> None:
    """Say where the same special token is an id in some shards of a source, and text in others."""
    about = [shard.facts.tokenizer for shard in shards if shard.facts is not None]
    parsed = sum(each.parse_special_tokens for each in about)
    if 0 < parsed < len(about):
        logger.warning(
            "note: source %s: in %d of %d shards the text of a special token is its id "
            "(--parse-special-tokens), in the others it is characters", name, parsed, len(about),
        )  # fmt: skip


def _foreign_ends(name: str, shards: Sequence[Shard], eod: int) -> list[str]:
    """The problems of shards whose documents end with another id, and a warning for those without.

    A tokenizer's fingerprint is of the file with its vocabulary, which need not name the end token.
    """
    facts = [(shard.prefix, shard.facts) for shard in shards if shard.facts is not None]
    # The turns of conversations have ends of their own.
    without = sum(not about.append_eod and about.mask is None for _, about in facts)
    if without:
        logger.warning(
            "source %s: %d of %d shards were written without end tokens (append_eod is false): "
            "from them a model does not learn where a text ends",
            *(name, without, len(shards)),
        )
    return [
        f"source {name}: the documents of {prefix} end with id {about.tokenizer.eod}, which is not "
        f"the end token of data.tokenizer_model, {eod}"
        for prefix, about in facts
        if about.append_eod and about.tokenizer.eod != eod
    ]
