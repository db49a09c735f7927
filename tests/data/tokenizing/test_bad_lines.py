"""Every kind of odd line: taken, counted as empty, or listed with its number and the reason."""

import re
from pathlib import Path

import orjson
import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing import tokenize
from tests.data.tokenizing.samples import (
    contents,
    documents,
    leftovers,
    rejected,
    settings_in,
    write_lines,
)

TAKEN = "taken"
EMPTY = "empty"

# name: (the line, what becomes of it: taken as the document [5, 6], empty, or the reason)
LINES: dict[str, tuple[bytes, str]] = {
    "plain": (b'{"text": "5 6"}', TAKEN),
    "other fields": (b'{"id": 7, "text": "5 6", "meta": {"text": [1]}}', TAKEN),
    "Windows line break": (b'{"text": "5 6"}\r', TAKEN),
    "byte order mark": (b'\xef\xbb\xbf{"text": "5 6"}', TAKEN),
    "NaN in another field": (b'{"text": "5 6", "score": NaN}', TAKEN),
    "lone surrogate in another field": (b'{"text": "5 6", "title": "\\ud800"}', TAKEN),
    "number of many digits elsewhere": (b'{"text": "5 6", "n": ' + b"9" * 400 + b"}", TAKEN),
    "escaped line break": (b'{"text": "5\\n6"}', TAKEN),
    "blank": (b"", EMPTY),
    "white space": (b" \t\r", EMPTY),
    "empty text": (b'{"text": ""}', EMPTY),
    "text without a token": (b'{"text": " \\n "}', EMPTY),
    "malformed JSON": (
        b'{"text": "5 6"',
        "malformed JSON: Expecting ',' delimiter at character 14",
    ),
    "two objects": (b'{"text": "5"} {"text": "6"}', "malformed JSON: Extra data"),
    "zero bytes": (b"\0" * 30, "malformed JSON"),
    "nested too deep": (b'{"text": "5", "x": ' + b"[" * 100_000, "malformed JSON: nested too deep"),
    "list": (b'["text"]', "not a JSON object but a list"),
    "null alone": (b"null", "not a JSON object but null"),
    "missing key": (b'{"txt": "5 6"}', "key 'text' is missing"),
    "null": (b'{"text": null}', "key 'text' is null, not a string"),
    "number": (b'{"text": 5}', "key 'text' is a number, not a string"),
    "boolean": (b'{"text": true}', "key 'text' is a boolean, not a string"),
    "list of texts": (b'{"text": ["5", "6"]}', "key 'text' is a list, not a string"),
    "object": (b'{"text": {"a": "5"}}', "key 'text' is an object, not a string"),
    "lone surrogate": (b'{"text": "5 \\ud83d"}', r"lone surrogate \\ud83d, at character 2"),
    "invalid UTF-8": (b'{"text": "5 \xff"}', "invalid UTF-8: byte 0xff at byte 12 of the line"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "invalid UTF-8: byte 0xe9 at byte 10"),
    "no id": (b'{"text": "5 six"}', "needs ids separated by spaces: .*'six'"),
    "id out of range": (b'{"text": "5 999"}', "id 999 must lie in 0 … 998"),
    "negative id": (b'{"text": "5 -1"}', "id -1 must lie in 0"),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_each_kind_of_line(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between good lines, each kind has its outcome, and costs no other line anything."""
    # Chunks of a few lines: numbers must be those of the file.
    monkeypatch.setattr("megatron_hybrid.data.tokenizing.chunks.CHUNK_BYTES", 100)
    lines: list[bytes | list[int]] = []
    for index, (line, _) in enumerate(LINES.values()):
        lines += [line, [index]]
    settings = settings_in(tmp_path, write_lines(tmp_path / "in.jsonl", lines), workers=workers)
    report = tokenize(settings)
    expected = []
    for index, (_, outcome) in enumerate(LINES.values()):
        expected += [[5, 6], [index]] if outcome == TAKEN else [[index]]
    assert documents(tmp_path / "out") == expected
    reasons = {
        2 * index + 1: reason
        for index, (_, reason) in enumerate(LINES.values())
        if reason not in (TAKEN, EMPTY)
    }
    listed = rejected(settings)
    assert [entry["line"] for entry in listed] == list(reasons)
    for entry, reason in zip(listed, reasons.values(), strict=True):
        assert re.search(reason, entry["reason"]), entry
        assert entry["file"] == str(tmp_path / "in.jsonl")
        line = lines[entry["line"] - 1]
        refused_by_tokenizer = re.search(r"\bids?\b", reason)
        start = orjson.loads(line)["text"].encode() if refused_by_tokenizer else line[:200]
        assert entry["start"] == start.decode(errors="backslashreplace")
    counts = report.facts["text"].input
    assert (counts.lines, counts.rejected) == (len(lines), len(reasons))
    assert counts.empty == sum(outcome == EMPTY for _, outcome in LINES.values())
    assert counts.lines == counts.rejected + counts.empty + len(expected)


def test_several_files_and_the_last_line(tmp_path: Path) -> None:
    """Line numbers start anew in each file; a file cut in a line says so; an empty file is none."""
    first = write_lines(tmp_path / "a.jsonl", [[1], b"bad", [2]])
    empty = write_lines(tmp_path / "b.jsonl", [])
    cut = tmp_path / "c.jsonl"
    cut.write_bytes(b'{"text": "3"}\n{"text": "4')
    whole = tmp_path / "d.jsonl"
    whole.write_bytes(b'{"text": "5"}\n{"text": "6"}')  # no line break at the end, yet whole
    settings = settings_in(tmp_path, first, empty, cut, whole)
    report = tokenize(settings)
    assert documents(tmp_path / "out") == [[1], [2], [3], [5], [6]]
    one, two = rejected(settings)
    assert (one["file"], one["line"]) == (str(first), 2)
    assert "cut short" not in one["reason"]
    assert (two["file"], two["line"]) == (str(cut), 2)
    assert two["reason"].endswith("(the last line, without a line break: was the file cut short?)")
    assert [item.bytes for item in report.facts["text"].input.files] == [
        path.stat().st_size for path in (first, empty, cut, whole)
    ]


def test_several_keys(tmp_path: Path) -> None:
    """A line must have every key; an empty text costs only that key's output a document."""
    lines = [b'{"text": "1", "title": "2"}', b'{"text": "3", "title": ""}', b'{"text": "4"}', b""]
    outputs = {"text": tmp_path / "a", "title": tmp_path / "b"}
    write_lines(tmp_path / "in.jsonl", lines)
    settings = settings_in(tmp_path, outputs=outputs, append_eod=True)
    report = tokenize(settings)
    assert documents(tmp_path / "a") == [[1, 999], [3, 999]]
    assert documents(tmp_path / "b") == [[2, 999]]
    assert [facts.input.empty for facts in report.facts.values()] == [1, 2]
    assert [entry["reason"] for entry in rejected(settings)] == ["key 'title' is missing"]


def test_threshold(tmp_path: Path) -> None:
    """At the allowed share the good lines are published; above it only the list of bad ones."""
    write_lines(tmp_path / "in.jsonl", [[1], b"bad", [2], [3]])
    tokenize(settings_in(tmp_path, max_rejected_fraction=0.25))
    before = contents(tmp_path / "out")
    write_lines(tmp_path / "in.jsonl", [[1], b"bad", b'{"text": 5}', [3]])
    strict = settings_in(tmp_path, max_rejected_fraction=0.25)
    message = (
        r"2 of 4 lines are bad, more than --max-rejected-fraction 0.25 allows; nothing was "
        r"published. The first is line 2 of .*in.jsonl: malformed JSON: .* All are in .*out_reject"
    )
    with pytest.raises(DataError, match=message):
        tokenize(strict)
    assert contents(tmp_path / "out") == before
    assert [entry["line"] for entry in rejected(strict)] == [2, 3]
    assert leftovers(tmp_path) == []


def test_list_of_an_earlier_run_goes(tmp_path: Path) -> None:
    """A run without a bad line leaves no list of bad lines behind."""
    write_lines(tmp_path / "in.jsonl", [[1], b"bad"])
    settings = settings_in(tmp_path)
    tokenize(settings)
    assert settings.rejected_path.exists()
    write_lines(tmp_path / "in.jsonl", [[1]])
    tokenize(settings)
    assert not settings.rejected_path.exists()


def test_wrong_key_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no line is good, a large input is not read to its end."""
    monkeypatch.setattr("megatron_hybrid.data.tokenizing.chunks.CHUNK_BYTES", 1000)
    write_lines(tmp_path / "in.jsonl", [b'{"content": "5"}'] * 5000)
    with pytest.raises(DataError, match=r"(\d+) of \1 lines are bad \(stopped there\)") as error:
        tokenize(settings_in(tmp_path))
    assert "key 'text' is missing" in str(error.value)
    assert len(rejected(settings_in(tmp_path))) < 1200


def test_nothing_but_empty_lines(tmp_path: Path) -> None:
    """An input without a document is an error, whatever it holds instead."""
    write_lines(tmp_path / "in.jsonl", [b"", b'{"text": ""}'])
    with pytest.raises(DataError, match=r"--input .*in.jsonl: no document in 2 lines"):
        tokenize(settings_in(tmp_path))
    write_lines(tmp_path / "in.jsonl", [])
    with pytest.raises(DataError, match=r"--input .*in.jsonl: no document in 0 lines"):
        tokenize(settings_in(tmp_path))
    assert list(tmp_path.glob("out*")) == []
