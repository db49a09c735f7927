"""What is evaluated: documents of text files and of token files, each file a source of its own."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.document_starts import DocumentStarts
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.source import Source, open_sources
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizing.chunks import cut
from megatron_hybrid.data.tokenizing.inputs import Input, find_inputs, reading
from megatron_hybrid.data.tokenizing.records import read_records
from megatron_hybrid.errors import UserError

logger = logging.getLogger(__name__)

_PLAIN = ".txt"
_KEY = "text"  # unless another is said


@dataclass(frozen=True)
class Texts:
    """The documents of a text file: a line of JSONL or a row of a table each; all of a .txt."""

    input: Input
    json_key: str
    tokenizer: Tokenizer
    append_eod: bool

    @property
    def name(self) -> str:
        """The path as it was given."""
        return str(self.input.path)

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """Their tokens; texts of none are left out.

        Raises:
            DataError: the file cannot be read, or holds a line that is no document.
        """
        for text in self._texts():
            ids = self.tokenizer.encode(text)
            if ids:
                yield np.array([*ids, *([self.tokenizer.eod] if self.append_eod else [])])

    def _texts(self) -> Iterator[str]:
        path = self.input.path
        if path.suffix == _PLAIN:
            with reading(path):
                content = path.read_bytes()
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"--input {path} is not UTF-8 text: {error.reason}") from error
            return
        lines = 0
        for chunk in cut([self.input], [self.json_key]):
            records = read_records(chunk.payload, [self.json_key])
            if records.rejected:
                first = records.rejected[0]
                raise DataError(
                    f"--input {path} line {lines + first.line}: {first.reason}: {first.start!r}"
                )
            lines += records.lines
            yield from records.texts[0]


@dataclass(frozen=True)
class Tokens:
    """The documents of token files."""

    name: str
    source: Source

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """Their tokens as they are there, end tokens included.

        Raises:
            DataError: a file cannot be read.
        """
        offset = 0
        for shard in self.source.shards:
            starts = DocumentStarts(shard, self.source.files)
            for first, end in pairwise([*_all(starts), shard.tokens]):
                ids = np.empty(end - first, dtype=np.int64)
                self.source.read(offset + first, ids)
                yield ids
            offset += shard.tokens


def _all(starts: DocumentStarts) -> Iterator[int]:
    return (starts[number] for number in range(len(starts)))


Documents = Texts | Tokens


def find_texts(
    patterns: Sequence[str], json_key: str, tokenizer: Tokenizer, *, append_eod: bool
) -> list[Documents]:
    """Text files by name or glob.

    Raises:
        UserError: every file that is not there or of another kind.
    """
    if not patterns:
        return []
    inputs, problems = find_inputs(patterns, [json_key])
    if json_key != _KEY and all(each.path.suffix == _PLAIN for each in inputs):
        problems.append(
            f"--json-key {json_key}: every --input is a {_PLAIN}, which has no fields; allowed: no "
            "--json-key"
        )
    if problems:
        raise UserError("\n".join(problems))
    return [Texts(each, json_key, tokenizer, append_eod) for each in inputs]


def find_tokens(prefixes: Sequence[str], tokenizer: Tokenizer) -> list[Documents]:
    """Token files by prefix or glob, a source each.

    Raises:
        DataError: every file that is missing, damaged or of another tokenizer.
    """
    opened = open_sources({each: [each] for each in prefixes}, tokenizer.fingerprint, tokenizer.eod)
    shards = [shard for source in opened.values() for shard in source.shards]
    if found := [str(shard.prefix) for shard in shards if shard.looks_masked]:
        logger.warning(
            "note: %s: conversations, of which every token is counted, whoever speaks; what the "
            "assistant says is counted of the data of a run with training.objective=sft",
            ", ".join(found),
        )
    return [
        Tokens(str(shard.prefix), Source(str(shard.prefix), (shard,), source.files))
        for source in opened.values()
        for shard in source.shards
    ]


def check_ids(ids: NDArray[np.int64], name: str, vocab_size: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        DataError: naming one.
    """
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise DataError(
            f"{name}: id {outside[0]} is outside the vocabulary (0 … {vocab_size - 1}): the files "
            "are damaged, or were made with another tokenizer"
        )
