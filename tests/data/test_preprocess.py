"""JSONL to indexed files: the bytes are Megatron's, bad lines are named, kills do no harm."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedFileWriter, open_indexed
from megatron_hybrid.data.tokenize import TokenizeSettings, tokenize_jsonl
from megatron_hybrid.data.tokenizer import build_tokenizer
from tests.data.conftest import TEXTS, write_corpus, write_jsonl

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture
def settings(tmp_path: Path, sentencepiece_model: Path) -> TokenizeSettings:
    return TokenizeSettings(
        input=write_jsonl(tmp_path / "in.jsonl", TEXTS * 3),
        output_prefix=tmp_path / "out",
        tokenizer_type="sentencepiece",
        tokenizer_model=sentencepiece_model,
        append_eod=True,
    )


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_bytes_equal_the_engines(tmp_path: Path, vocab_size: int) -> None:
    """Our writer equals IndexedDatasetBuilder on both sides of the change of dtype."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, n) for n in (1, 7, 1000, 1, 50)]
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    write_corpus(tmp_path / "b", documents, vocab_size)
    assert pair(tmp_path / "a") == pair(tmp_path / "b")


def test_workers_keys_and_order(
    settings: TokenizeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers over many chunks write what a plain loop would, for each key."""
    monkeypatch.setattr("megatron_hybrid.data.tokenize._CHUNK_BYTES", 100)
    records = [{"text": f"{i} {TEXTS[i % 4]}", "title": f"title {i}"} for i in range(60)]
    settings.input.write_text("\n".join(map(json.dumps, records)))  # no newline at the end
    report = tokenize_jsonl(replace(settings, json_keys=("text", "title"), workers=2))
    tokenizer = build_tokenizer("sentencepiece", settings.tokenizer_model)
    assert (report.lines, report.documents) == (60, 60)
    for key in ("text", "title"):
        expected = [[*tokenizer.encode(record[key]), tokenizer.eod] for record in records]
        other = settings.output_prefix.with_name(f"expected_{key}")
        write_corpus(other, expected, tokenizer.vocab_size)
        assert pair(settings.indexed_prefix(key)) == pair(other)
        assert report.tokens[key] == sum(map(len, expected))


BAD_LINES = {
    2: (b'{"text": "cut', "malformed JSON"),
    4: (b'{"title": "no text"}', "key 'text' is missing"),
    5: (b'{"text": 5}', "key 'text' is int, not a string"),
    6: (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at byte 10"),
    8: (b'["text"]', "not a JSON object but list"),
    9: (b'{"text": "\\ud800"}', "malformed JSON"),
}


@pytest.fixture
def bad_settings(settings: TokenizeSettings) -> TokenizeSettings:
    """Lines 1 to 12: six good, six bad; then an empty document and a blank line."""
    good = b'{"text": "good"}'
    lines = [BAD_LINES[n][0] if n in BAD_LINES else good for n in range(1, 13)]
    settings.input.write_bytes(b"\n".join([*lines, b'{"text": ""}', b"", b""]))
    return settings


def rejected(settings: TokenizeSettings) -> list[dict[str, object]]:
    return [json.loads(line) for line in settings.rejected_path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named(
    bad_settings: TokenizeSettings, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tolerated bad lines cost nothing but themselves; every line is accounted for."""
    monkeypatch.setattr("megatron_hybrid.data.tokenize._CHUNK_BYTES", 40)
    report = tokenize_jsonl(replace(bad_settings, max_bad_fraction=0.5, workers=workers))
    assert (report.lines, report.documents, report.empty, report.rejected) == (14, 6, 2, 6)
    listed = rejected(bad_settings)
    assert [entry["line"] for entry in listed] == list(BAD_LINES)
    for entry, (_, reason) in zip(listed, BAD_LINES.values(), strict=True):
        assert str(entry["reason"]).startswith(reason)
    assert len(open_indexed(bad_settings.indexed_prefix("text")).document_lengths) == 6


def test_too_many_bad_lines_publish_nothing(bad_settings: TokenizeSettings) -> None:
    """By default one bad line is too many: the old output stays, and the list says why."""
    prefix = bad_settings.indexed_prefix("text")
    write_corpus(prefix, [[1, 2, 3]])
    before = pair(prefix)
    with pytest.raises(DataError, match=r"6 of 14 lines are bad.*first is line 2: malformed JSON"):
        tokenize_jsonl(bad_settings)
    assert pair(prefix) == before
    assert len(rejected(bad_settings)) == 6
    assert not list(prefix.parent.glob("*.part"))


def test_command(bad_settings: TokenizeSettings) -> None:
    """The script exits 1 with one message for bad lines, and 0 with a summary when told to."""
    command = [sys.executable, TOOL, "--input", bad_settings.input]
    command += ["--output-prefix", bad_settings.output_prefix, "--append-eod"]
    command += ["--tokenizer-type", "sentencepiece"]
    command += ["--tokenizer-model", bad_settings.tokenizer_model]
    strict = subprocess.run(command, capture_output=True, text=True)
    assert strict.returncode == 1
    assert "6 of 14 lines are bad" in strict.stderr
    assert "Traceback" not in strict.stderr
    lenient = subprocess.run(
        [*command, "--max-bad-fraction", "0.5"], capture_output=True, text=True
    )
    assert lenient.returncode == 0, lenient.stderr
    assert "14 lines, 2 empty, 6 rejected" in lenient.stdout


def test_killed_while_writing(settings: TokenizeSettings) -> None:
    """kill -9 in the middle leaves the old pair as it was and no process behind."""
    prefix = settings.indexed_prefix("text")
    write_corpus(prefix, [[1, 2, 3]])
    before = pair(prefix)
    write_jsonl(settings.input, ["some words that take a while to encode " * 50] * 6_000)
    command = [sys.executable, TOOL, "--input", settings.input, "--workers", "2"]
    command += ["--output-prefix", settings.output_prefix]
    command += ["--tokenizer-type", "sentencepiece", "--tokenizer-model", settings.tokenizer_model]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = Path(f"{prefix}.bin.part")
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(DataError, match="another process is writing"):
        IndexedFileWriter(prefix, 100)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    assert pair(prefix) == before
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    # What is left over does not hinder the next run.
    write_jsonl(settings.input, TEXTS)
    assert tokenize_jsonl(settings).documents == len(TEXTS)
    assert not list(prefix.parent.glob("*.part"))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_killed_while_publishing(tmp_path: Path, step: int) -> None:
    """A kill between any two moves leaves nothing that loads, or the whole new pair."""
    prefix = tmp_path / "corpus"
    write_corpus(prefix, [[1] * 5, [2] * 5])  # as many bytes as the new one, so sizes tell nothing
    script = f"""
import os, numpy as np
from pathlib import Path
from megatron_hybrid.data import indexed
writer = indexed.IndexedFileWriter(Path({str(prefix)!r}), 1000)
writer.add_documents(np.full(10, 3, dtype="u2").tobytes(), np.array([4, 6], dtype="i4"))
writer.finish()
calls = 0
def sync_or_die(folder):
    global calls
    if calls == {step}:
        os.kill(os.getpid(), 9)
    calls += 1
indexed.sync_folder = sync_or_die
writer.publish()
"""
    result = subprocess.run([sys.executable, "-c", script])
    assert result.returncode == -signal.SIGKILL
    if step < 2:
        with pytest.raises(DataError, match="is missing"):
            open_indexed(prefix)
    else:
        assert open_indexed(prefix).document_lengths.tolist() == [4, 6]
        assert set(np.fromfile(f"{prefix}.bin", dtype="u2")) == {3}


def test_damaged_pairs_do_not_open(tmp_path: Path) -> None:
    """A cut or mixed pair is refused by name instead of read as garbage."""
    prefix = tmp_path / "a"
    write_corpus(prefix, [[1, 2, 3], [4, 5]])
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    whole = pair(prefix)
    os.truncate(bin_path, 4)
    with pytest.raises(DataError, match=r"a\.bin has 4 bytes; a\.idx describes 10"):
        open_indexed(prefix)
    bin_path.write_bytes(whole[0])
    os.truncate(idx_path, 40)
    with pytest.raises(DataError, match=r"a\.idx has 40 bytes; its header promises 82"):
        open_indexed(prefix)
    idx_path.write_bytes(b"PK" + whole[1])
    with pytest.raises(DataError, match="not an index of Megatron's format"):
        open_indexed(prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": Path("nowhere.jsonl")}, "--input nowhere.jsonl is not a file"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"max_bad_fraction": 1.0}, "must be in"),
        ({"json_keys": ("a", "a")}, "--json-keys a a"),
    ],
)
def test_wrong_settings(
    settings: TokenizeSettings, change: dict[str, object], message: str
) -> None:
    """Wrong flags are refused before any file is touched."""
    with pytest.raises(DataError, match=message):
        tokenize_jsonl(replace(settings, **change))
    assert not list(settings.output_prefix.parent.glob("out*"))
