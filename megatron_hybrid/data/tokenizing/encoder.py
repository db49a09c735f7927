"""The texts of a chunk to ids, with the end of each document."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizing.chunks import ByteRange, Lines, Rows
from megatron_hybrid.data.tokenizing.records import (
    Records,
    Rejected,
    read_objects,
    read_records,
)
from megatron_hybrid.data.tokenizing.settings import TokenizeSettings

if TYPE_CHECKING:
    from megatron_hybrid.data.chat import ChatEncoder


@dataclass(frozen=True)
class Documents:
    """The documents of one key of a chunk.

    Attributes:
        tokens: their ids end to end, in the dtype of the indexed file; of conversations, tokens of
            `masked_dtype`.
        lengths: `[n]` int32, tokens of each document, at least 1.
        empty: lines whose text has no token.
    """

    tokens: bytes
    lengths: NDArray[np.int32]
    empty: int


@dataclass(frozen=True)
class Encoded:
    """The outcome of a chunk of so many lines; for each key, its documents."""

    lines: int
    rejected: list[Rejected]
    documents: list[Documents]


class Encoder:
    """Turns chunks into documents."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._keys = keys
        self._append_eod = append_eod

    def encode(self, payload: ByteRange | Lines | Rows) -> Encoded:
        """Encode what a chunk holds.

        Raises:
            DataError: the file cannot be read, or the tokenizer gave an id that it does not have.
        """
        records = read_records(payload, self._keys)
        try:
            documents = [self._documents(texts, records.blank) for texts in records.texts]
        except DataError:
            self._reject_refused(records)
            documents = [self._documents(texts, records.blank) for texts in records.texts]
        return Encoded(records.lines, records.rejected, documents)

    def _documents(self, texts: list[str], blank: int) -> Documents:
        ids, lengths = self._tokenizer.encode_batch(texts)
        highest = int(ids.max(initial=0))
        if highest >= self._tokenizer.vocab_size:
            raise DataError(
                f"the tokenizer gave id {highest}; its vocabulary has {self._tokenizer.vocab_size}"
            )
        kept = lengths[lengths > 0]
        empty = blank + len(lengths) - len(kept)
        if self._append_eod:
            ids = np.insert(ids, np.cumsum(kept, dtype=np.int64), self._tokenizer.eod)
            kept = kept + np.int32(1)
        return Documents(ids.tobytes(), kept, empty)

    def _reject_refused(self, records: Records) -> None:
        """Move records that the tokenizer refuses, as words that are no ids, to the rejected."""
        good = []
        for index, number in enumerate(records.numbers):
            for texts in records.texts:
                try:
                    self._documents([texts[index]], 0)
                except DataError as error:
                    records.reject(number, str(error), texts[index].encode())
                    break
            else:
                good.append(index)
        records.numbers = [records.numbers[index] for index in good]
        records.texts = [[texts[index] for index in good] for texts in records.texts]
        records.rejected.sort(key=lambda rejected: rejected.line)


class ConversationEncoder:
    """Turns chunks of JSONL into documents that are conversations, of tokens with a mask."""

    def __init__(self, chat: "ChatEncoder") -> None:
        self._chat = chat

    def encode(self, payload: ByteRange | Lines | Rows) -> Encoded:
        """Encode what a chunk holds.

        Raises:
            DataError: the file cannot be read.
        """
        records, objects = read_objects(payload)
        rows = []
        for number, record in zip(records.numbers, objects, strict=True):
            try:
                rows.append(self._chat.encode(record))
            except DataError as error:
                start = json.dumps(record, ensure_ascii=False)
                records.reject(number, str(error), start.encode(errors="backslashreplace"))
        records.rejected.sort(key=lambda rejected: rejected.line)
        lengths = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
        tokens = b"".join(row.tobytes() for row in rows)
        return Encoded(records.lines, records.rejected, [Documents(tokens, lengths, records.blank)])


def build_encoder(
    settings: TokenizeSettings, tokenizer: Tokenizer
) -> Encoder | ConversationEncoder:
    """The encoder of what the settings name.

    Raises:
        DataError: the tokenizer has no chat template that can be used.
    """
    if settings.chat:
        return ConversationEncoder(settings.open_chat(tokenizer))
    return Encoder(tokenizer, settings.keys, settings.append_eod)
