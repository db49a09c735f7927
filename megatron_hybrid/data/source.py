"""A source of tokens: one or more shards, read as one long row of ids."""

import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.config.token_files import prefixes
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.index import Index
from megatron_hybrid.data.shard import Shard, open_shard

logger = logging.getLogger(__name__)


class OpenFiles:
    """Descriptors of the files that were read last; the oldest is closed for another one.

    Files are read, not mapped into memory: it is as fast, and a file that is cut short under a run
    is an error with its name, where a mapping would end the process.
    """

    _MOST = 256

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}  # by prefix

    def descriptor(self, shard: Shard) -> int:
        """The open `.bin` of a shard.

        Raises:
            DataError: it cannot be opened, or has another size than when the shard was.
        """
        descriptor = self._descriptors.pop(shard.prefix, None)
        if descriptor is None:
            if len(self._descriptors) == self._MOST:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(shard.bin_path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(descriptor).st_size != shard.tokens * shard.dtype.itemsize:
                os.close(descriptor)
                raise DataError(f"{shard.bin_path} has changed since the run opened it")
        self._descriptors[shard.prefix] = descriptor  # as the last one
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Descriptors mean nothing in another program."""
        return OpenFiles, ()


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
        assert offset >= 0 and offset + len(out) <= self.tokens
        number = bisect_right(self._ends, offset)
        while len(out):
            shard, end = self.shards[number], self._ends[number]
            count = min(len(out), end - offset)
            out[:count] = self._read_shard(shard, offset - (end - shard.tokens), count)
            out, offset, number = out[count:], offset + count, number + 1

    def describe(self, token: int) -> str:
        """Where a token is, for a message: source, file, document, and byte."""
        number = bisect_right(self._ends, token)
        shard = self.shards[number]
        place = token - (self._ends[number] - shard.tokens)
        return f"source {self.name}: {Index(shard.prefix).describe(place)}"

    def _read_shard(self, shard: Shard, first: int, count: int) -> NDArray[Any]:
        """Ids `[first, first + count)` of a shard."""
        ids = np.empty(count, dtype=shard.dtype)
        rest, at = memoryview(ids).cast("B"), first * shard.dtype.itemsize
        try:
            descriptor = self.files.descriptor(shard)
            while rest:
                got = os.preadv(descriptor, [rest], at)
                if not got:
                    raise DataError(f"{shard.bin_path} was cut short while the run read it")
                rest, at = rest[got:], at + got
        except OSError as error:
            raise DataError(f"cannot read {shard.bin_path}: {error.strerror}") from error
        return ids


def open_sources(
    paths: Mapping[str, Sequence[str]], fingerprint: str | None = None
) -> dict[str, Source]:
    """Open sources and check that their files are whole, distinct and of one tokenizer.

    Args:
        paths: for each source by name, prefixes or globs of prefixes. The shards of a source are
            sorted by path.
        fingerprint: of the run's tokenizer; None: any.

    Raises:
        DataError: with every file that is missing, damaged, named twice or of another tokenizer.
    """
    problems: list[str] = []
    sources = {}
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
        sources[name] = Source(name, tuple(shards), files)
    if problems:
        raise DataError("\n".join(problems))
    return sources


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
