"""Files of all kinds: read alike, or refused by name before anything is written."""

import gzip
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing import TokenizeSettings, chunks, tokenize
from tests.data.tokenizing.samples import (
    contents,
    documents,
    leftovers,
    rejected,
    settings_in,
    write_lines,
)

DOCUMENTS = [[n, n % 7, n % 100] for n in range(900)]


def write_gzip(path: Path, lines: Sequence[list[int]]) -> None:
    plain = write_lines(path.with_suffix(""), lines).read_bytes()
    # Two members, as `cat a.gz b.gz` makes, that meet within a line.
    path.write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))


def write_zstd(path: Path, lines: Sequence[list[int]]) -> None:
    plain = write_lines(path.with_suffix(""), lines).read_bytes()
    codec = pa.Codec("zstd")
    frames = (plain[:5000], plain[5000:])
    path.write_bytes(b"".join(codec.compress(frame, asbytes=True) for frame in frames))


def skippable(length: int, low: int = 0) -> bytes:
    """A frame that decoders pass over; there are sixteen kinds."""
    return bytes([0x50 + low, 0x2A, 0x4D, 0x18]) + length.to_bytes(4, "little") + b"x" * length


def write_skippable_zstd(path: Path, lines: Sequence[list[int]]) -> None:
    """As parallel compressors do: skippable frames before the others, and one at the end."""
    write_zstd(path, lines)
    frames = skippable(4), skippable(70_000, 15), path.read_bytes(), skippable(70, 7)
    path.write_bytes(b"".join(frames))


def write_parquet(path: Path, lines: Sequence[list[int]]) -> None:
    texts = [" ".join(map(str, line)) for line in lines]
    table = pa.table({"id": range(len(texts)), "text": texts})
    parquet.write_table(table, path, row_group_size=250)


def write_dictionary_parquet(path: Path, lines: Sequence[list[int]]) -> None:
    texts = pa.array([" ".join(map(str, line)) for line in lines]).dictionary_encode()
    parquet.write_table(pa.table({"text": texts}), path)


WRITERS: dict[str, Callable[[Path, Sequence[list[int]]], object]] = {
    "a.jsonl": write_lines,
    "a.json": write_lines,
    "a": write_lines,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "b.jsonl.zst": write_skippable_zstd,
    "a.parquet": write_parquet,
    "b.parquet": write_dictionary_parquet,
}


@pytest.mark.parametrize("chunk_bytes", [100, 1 << 20])
@pytest.mark.parametrize("name", WRITERS)
def test_formats(
    tmp_path: Path, name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every format gives the same documents, however it is cut; progress ends at the last byte."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    WRITERS[name](tmp_path / name, DOCUMENTS)
    seen: list[tuple[str, int, int]] = []
    report = tokenize(settings_in(tmp_path, tmp_path / name), lambda *step: seen.append(step))
    assert documents(tmp_path / "out") == DOCUMENTS
    size = (tmp_path / name).stat().st_size
    assert seen[-1] == ("tokenise", size, size)
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert (report.lines, report.input_bytes) == (len(DOCUMENTS), size)


def test_many_inputs_of_all_kinds(tmp_path: Path) -> None:
    """Files keep the order of the command line, a glob's files that of their names."""
    parts = tmp_path / "parts"
    (parts / "folder.jsonl").mkdir(parents=True)
    write_lines(parts / "2.jsonl", [[2]])
    write_gzip(parts / "1.jsonl.gz", [[1]])
    (parts / "1.jsonl").rename(tmp_path / "odd[1].jsonl")
    write_parquet(tmp_path / "z.parquet", [[9]])
    inputs = (tmp_path / "z.parquet", f"{parts}/*.json*", tmp_path / "odd[1].jsonl")
    report = tokenize(settings_in(tmp_path, *inputs, workers=2))
    assert documents(tmp_path / "out") == [[9], [1], [2], [1]]
    names = [Path(item.path).name for item in report.facts["text"].input.files]
    assert names == ["z.parquet", "1.jsonl.gz", "2.jsonl", "odd[1].jsonl"]


def test_bad_rows(tmp_path: Path) -> None:
    """A null, or bytes that are no UTF-8, cost a table their row only; rows are numbered from 1."""
    binary = pa.array([b"1 2", None, b"3 \xff", b"4", b""], pa.binary())
    texts = pa.StringArray.from_buffers(5, *binary.buffers()[1:], binary.buffers()[0])
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    settings = settings_in(tmp_path, tmp_path / "a.parquet")
    report = tokenize(settings)
    assert documents(tmp_path / "out") == [[1, 2], [4]]
    assert [(entry["line"], entry["reason"]) for entry in rejected(settings)] == [
        (2, "column 'text' is null"),
        (3, "column 'text': invalid UTF-8: byte 0xff at byte 2"),
    ]
    assert report.facts["text"].input.empty == 1


def test_a_line_of_many_chunks(tmp_path: Path, fast_tokenizer: Path) -> None:
    """20 MB: it is one document among the others, plain or compressed, by two workers."""
    word = "the quick brown fox "
    long = word * (20 * chunks.CHUNK_BYTES // len(word))
    write_lines(tmp_path / "in.jsonl", [*(f'{{"text": "{text}"}}' for text in ("a", long, "b"))])
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes(), 1))
    for name in ("in.jsonl", "in.jsonl.gz"):
        settings = settings_in(
            tmp_path, tmp_path / name, tokenizer_type="huggingface", vocab_size=None, workers=2,
            tokenizer_model=fast_tokenizer,
        )  # fmt: skip
        facts = tokenize(settings).facts["text"]
        assert (facts.documents, facts.input.rejected) == (3, 0)
        assert facts.tokens == facts.longest_document_tokens + 2
        assert facts.longest_document_tokens >= 4 * len(long) // len(word)


def test_a_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no line at all does not fill the memory: it is refused, plain or compressed."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(chunks, "MAX_LINE_BYTES", 1 << 16)
    write_gzip(tmp_path / "a.jsonl.gz", [[1], [2] * (1 << 17)])
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(DataError, match=rf"--input .*{name} has a line of more than"):
            tokenize(settings_in(tmp_path, tmp_path / name))
    assert list(tmp_path.glob("out*")) == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.jsonl.gz", cut, "is cut short: Compressed file ended before"),
        ("a.jsonl.gz", flip, "cannot be read: "),
        ("a.jsonl.zst", cut, "cannot be read: Truncated compressed stream"),
        ("b.jsonl.zst", cut, "cannot be read: Truncated compressed stream"),
        ("a.parquet", cut, "is a damaged parquet file: "),
    ],
)
def test_damaged_files(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    """A file that cannot be read to its end is named, and what was published before stays."""
    before = [[5]]
    write_lines(tmp_path / "before.jsonl", before)
    tokenize(settings_in(tmp_path, tmp_path / "before.jsonl"))
    draw = random.Random(0)
    noise = [[draw.randrange(900) for _ in range(50)] for _ in range(2000)]
    WRITERS[name](tmp_path / name, noise)
    damage(tmp_path / name)
    for workers in (1, 2):
        with pytest.raises(DataError, match=rf"--input .*{name} {message}") as error:
            tokenize(settings_in(tmp_path, tmp_path / name, workers=workers))
        assert str(error.value).endswith("nothing was published")
    assert documents(tmp_path / "out") == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "cannot be read: No such file"),
        ("a.jsonl.bz2", b"BZh91AY", "is bzip2; allowed: JSONL, JSONL in gzip or zstd, parquet"),
        ("a.jsonl.xz", b"\xfd7zXZ\0", "is xz; allowed"),
        ("a.zip", b"PK\3\4", "is zip; allowed"),
        ("a.jsonl", '{"text": "1"}\n'.encode("utf-16"), "is UTF-16 text; allowed"),
        ("a.tar.gz", gzip.compress(b"a", mtime=0), "is an archive; allowed"),
        ("a.jsonl.gz", b'{"text": "1"}\n', "begins like jsonl, but its name says gzip"),
        ("a.jsonl.gz", b"", "is empty, but its name says gzip"),
        ("a.parquet", gzip.compress(b"a", mtime=0), "begins like gzip, but its name says parquet"),
        ("a.parquet", b"PAR1 and no more", "is a damaged parquet file"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    """What is no input is refused before any work, by what it is."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"--input .*{name} {message}"):
        tokenize(settings_in(tmp_path, tmp_path / name))


def raw_frame(head: bytes, content: bytes) -> bytes:
    """A zstd frame with one block, of bytes as they are."""
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + head + block + content


@pytest.mark.parametrize(
    ("head", "mib"),
    [
        (bytes([0x00, 17 << 3]), None),  # a window of 2**27 bytes
        (bytes([0x00, 17 << 3 | 1]), 144),
        (bytes([0x00, 21 << 3]), 2048),
        (bytes([0x20, 14]), None),  # one segment of 14 bytes
        (bytes([0xA0, 0, 0, 0, 9]), 144),
        (bytes([0xE3, 1, 2, 3, 4, 0, 0, 0, 0, 1, 0, 0, 0]), 4096),  # and a dictionary
    ],
)
def test_windows_of_zstd(tmp_path: Path, head: bytes, mib: int | None) -> None:
    """A window larger than the decoder takes is refused before any work, and how to mend it."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skippable(5) + raw_frame(head, b'{"text": "1"}\n'))
    if mib is None:
        tokenize(settings_in(tmp_path, path))
        assert documents(tmp_path / "out") == [[1]]
        return
    with pytest.raises(DataError, match=rf"--input .* has a zstd window of {mib} MiB; allowed"):
        tokenize(settings_in(tmp_path, path))


def test_columns(tmp_path: Path) -> None:
    """A table without the column, or with something else in it, is refused with what it has."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"id": [1], "content": ["1"]}), path)
    with pytest.raises(DataError, match=r"--json-key text: .* has no column .*: id, content"):
        tokenize(settings_in(tmp_path, path))
    with pytest.raises(DataError, match=r"--json-key id: .* has int64 there, not strings"):
        tokenize(settings_in(tmp_path, path, outputs={"id": tmp_path / "out"}))
    tokenize(settings_in(tmp_path, path, outputs={"content": tmp_path / "out"}))
    assert documents(tmp_path / "out") == [[1]]


def test_unreadable(tmp_path: Path) -> None:
    """A file that the system refuses to read is named with the system's reason."""
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"--input .*a.jsonl cannot be read: Input/output error"):
        tokenize(settings_in(tmp_path, tmp_path / "a.jsonl"))


def test_all_problems_at_once(tmp_path: Path) -> None:
    """One message lists everything that is wrong with the flags, and no file is touched."""
    (tmp_path / "file").touch()
    write_lines(tmp_path / "a.jsonl", [[1]])
    settings = TokenizeSettings(
        inputs=(str(tmp_path), f"{tmp_path}/*.gz", "/dev/null", *[str(tmp_path / "a.jsonl")] * 2),
        outputs={"": tmp_path / "file" / "out", "b": tmp_path},
        rejected_path=tmp_path / "a.jsonl",
        tokenizer_type="huggingface",
        tokenizer_model=None,
        workers=0,
        shuffle_memory_bytes=0,
        max_rejected_fraction=1.0,
    )
    with pytest.raises(DataError) as error:
        tokenize(settings)
    head, *problems = str(error.value).split("\n  - ")
    assert head == "12 problems:"
    for problem, expected in zip(
        problems,
        [
            "--json-key must name",
            "--workers 0 must be from 1 to 1024",
            "--shuffle-memory-gib 0 must be above 0",
            "--max-rejected-fraction 1 must be in [0, 1)",
            f"--input {tmp_path} is a folder; name its files, as in '{tmp_path}/*.jsonl'",
            f"--input {tmp_path}/*.gz matches no file",
            "--input /dev/null is not a regular file",
            f"--input {tmp_path}/a.jsonl is named twice",
            f"--output {tmp_path}/file/out: {tmp_path}/file is not a folder",
            f"--output {tmp_path} is a folder",
            f"--input {tmp_path}/a.jsonl would be overwritten",
            "--tokenizer-type=huggingface needs --tokenizer-model; it is unset",
        ],
        strict=True,
    ):
        assert problem.startswith(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "file"]


@pytest.mark.parametrize(
    "name",
    [
        "out.bin", "out.bin.part", "out.idx.part", "out.meta.json", "out.meta.json.part",
        "rejected.jsonl", "rejected.jsonl.part", "out.shuffle.part/in.jsonl",
    ],
)  # fmt: skip
def test_an_input_that_would_be_written_over(tmp_path: Path, name: str) -> None:
    """An input with the name of anything that a run writes or removes is refused and untouched."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_lines(path, [[1, 2]])
    content = path.read_bytes()
    settings = replace(settings_in(tmp_path, path), rejected_path=tmp_path / "rejected.jsonl")
    with pytest.raises(DataError, match=f"--input {re.escape(str(path))} would be overwritten"):
        tokenize(settings)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shuffle_memory_bytes": 10**18}, "--shuffle-memory-gib 9.31323e[+]08 must be above 0 and "
         "at most this machine's"),
        ({"vocab_size": 5 * 10**9}, "--vocab-size 5000000000 must be at most 2147483647"),
        ({"outputs": {"text": Path()}}, "--output [.] is a folder"),
    ],
)  # fmt: skip
def test_sizes_and_places_that_cannot_be(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """More memory than there is, ids that a file cannot hold, a folder as the files' name."""
    path = write_lines(tmp_path / "in.jsonl", [[1, 2]])
    with pytest.raises(DataError, match=message):
        tokenize(replace(settings_in(tmp_path, path), **change))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.open("ab").write(b'{"text": "1"}\n'),
        lambda path: path.write_bytes(path.read_bytes().replace(b"5", b"6")),
        lambda path: os.truncate(path, 4000),
        lambda path: path.unlink(),
    ],
    ids=["appended", "overwritten", "truncated", "removed"],
)
def test_input_that_changes(
    tmp_path: Path, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that is written to while it is read is noticed, and nothing is published."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    path = write_lines(tmp_path / "in.jsonl", DOCUMENTS)
    os.utime(path, (0, 0))  # the clock of a file system may be coarser than this test is fast
    changed = False

    def on_progress(*_: object) -> None:
        nonlocal changed
        if not changed:
            change(path)
            changed = True

    with pytest.raises(DataError, match=r"--input .*in.jsonl .*; nothing was published"):
        tokenize(settings_in(tmp_path), on_progress)
    assert changed
    assert list(tmp_path.glob("out*")) == []


def test_nothing_depends_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker and three write the same bytes, the list of bad lines and the facts included."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)
    write_lines(tmp_path / "a.jsonl", [*DOCUMENTS, b"bad", b""])
    write_gzip(tmp_path / "b.jsonl.gz", DOCUMENTS[:500])
    results = []
    for workers in (1, 3):
        settings = settings_in(
            tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", workers=workers,
            shuffle_seed=7, append_eod=True,
        )  # fmt: skip
        tokenize(settings)
        results.append((*contents(tmp_path / "out"), settings.rejected_path.read_bytes()))
    assert results[0] == results[1]
