"""Lines of JSON and rows of tables to texts; or why a line holds none.

A line that `orjson` refuses is given to Python's own parser: NaN, a byte order mark, or a lone
surrogate in a field that nobody asked for must not cost the document.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing.chunks import ByteRange, Lines, Rows
from megatron_hybrid.data.tokenizing.inputs import reading

_SHOWN_BYTES = 200
_JSON_TYPES = {
    "NoneType": "null",
    "bool": "a boolean",
    "int": "a number",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "dict": "an object",
}


@dataclass(frozen=True)
class Rejected:
    """A line that holds no document.

    Attributes:
        line: its number, from 1, within the chunk.
        start: its first bytes, as text.
    """

    line: int
    reason: str
    start: str


@dataclass
class Records:
    """The texts of one chunk.

    Attributes:
        lines: how many lines or rows there were: `len(numbers) + blank + len(rejected)`.
        numbers: the line number, from 1, of each record taken.
        texts: for each key, the text of each record taken.
        blank: lines with nothing but white space.
    """

    lines: int
    numbers: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    blank: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def reject(self, number: int, reason: str, content: bytes) -> None:
        start = content[:_SHOWN_BYTES].decode(errors="backslashreplace")
        self.rejected.append(Rejected(number, reason, start))


def read_records(payload: ByteRange | Lines | Rows, keys: Sequence[str]) -> Records:
    """The records that a chunk holds.

    Raises:
        DataError: its file cannot be read.
    """
    if isinstance(payload, Rows):
        return _read_rows(payload.columns, keys)
    return _read_lines(_content(payload), keys)


def _read_lines(content: bytes, keys: Sequence[str]) -> Records:
    """The records of whole lines of JSON, one object with every one of `keys` a line."""
    lines = _lines_of(content)
    records = Records(len(lines), texts=[[] for _ in keys])
    taken = records.numbers
    rows: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
            texts = [record[key] for key in keys]
            whole = {type(text) for text in texts} == {str}
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            try:
                texts = _read_odd_line(line, keys)
            except DataError as error:
                records.reject(number, str(error), line)
                continue
            if not texts:
                records.blank += 1
                continue
        taken.append(number)
        rows.append(texts)
    if rows:
        records.texts = [list(column) for column in zip(*rows, strict=True)]
    _explain_last_line(content, records)
    return records


def _read_rows(columns: Sequence[Sequence[bytes | None]], keys: Sequence[str]) -> Records:
    """The records of a table's rows; `columns` holds the UTF-8 of each of `keys`."""
    records = Records(len(columns[0]), texts=[[] for _ in keys])
    for number, row in enumerate(zip(*columns, strict=True), start=1):
        texts: list[str] = []
        for key, value in zip(keys, row, strict=True):
            if value is None:
                records.reject(number, f"column {key!r} is null", b"")
                break
            try:
                texts.append(value.decode())
            except UnicodeDecodeError as error:
                records.reject(number, f"column {key!r}: {_bad_utf8(error)}", value)
                break
        else:
            records.numbers.append(number)
            for column, text in zip(records.texts, texts, strict=True):
                column.append(text)
    return records


def read_objects(payload: ByteRange | Lines | Rows) -> tuple[Records, list[dict[str, Any]]]:
    """The objects that the lines of a chunk hold, for each of the records' `numbers`.

    Raises:
        DataError: its file cannot be read.
    """
    assert not isinstance(payload, Rows), "refused before any work"
    content = _content(payload)
    lines = _lines_of(content)
    records, objects = Records(len(lines)), []
    for number, line in enumerate(lines, start=1):
        try:
            record = orjson.loads(line)
        except ValueError:
            record = None
        try:
            if not isinstance(record, dict):
                record = _read_odd_object(line)
        except DataError as error:
            records.reject(number, str(error), line)
            continue
        if record is None:
            records.blank += 1
            continue
        records.numbers.append(number)
        objects.append(record)
    _explain_last_line(content, records)
    return records, objects


def _content(payload: ByteRange | Lines) -> bytes:
    if isinstance(payload, Lines):
        return payload.content
    with reading(payload.path), payload.path.open("rb") as file:
        file.seek(payload.begin)
        content = file.read(payload.end - payload.begin)
        if len(content) < payload.end - payload.begin:
            raise EOFError("it became shorter while it was read")
    return content


def _lines_of(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    if not lines[-1]:  # after the last line break
        lines.pop()
    return lines


def _read_odd_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of a line; none for a blank one; DataError says what is wrong with it."""
    record = _read_odd_object(line)
    if record is None:
        return []
    for key in keys:
        if key not in record:
            raise DataError(f"key {key!r} is missing")
        if not isinstance(record[key], str):
            kind = _JSON_TYPES[type(record[key]).__name__]
            raise DataError(f"key {key!r} is {kind}, not a string")
        _refuse_half_characters(key, record[key])
    return [record[key] for key in keys]


def _read_odd_object(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None for a blank one; DataError says what is wrong with it."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{_bad_utf8(error)} of the line") from error
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise DataError("malformed JSON: nested too deep") from error
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # an integer of thousands of digits
        raise DataError(f"malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"not a JSON object but {_JSON_TYPES[type(record).__name__]}")
    return record


def _refuse_half_characters(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"key {key!r} holds half a character, the lone surrogate {code}, "
            f"at character {error.start}"
        ) from error


def _bad_utf8(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start}"


def _explain_last_line(content: bytes, records: Records) -> None:
    """Say of a bad line that no line break ends, which only a file's last can be, what it hints."""
    last = records.rejected[-1] if records.rejected else None
    if last is not None and last.line == records.lines and not content.endswith(b"\n"):
        reason = f"{last.reason} (the last line, without a line break: was the file cut short?)"
        records.rejected[-1] = Rejected(last.line, reason, last.start)
