"""`megatron-hybrid data tokenize`, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import read_facts
from megatron_hybrid.data.tokenizing.settings import TokenizeSettings, check
from tests.data.tokenizing.samples import documents, write_lines

COMMAND = [sys.executable, "-X", "importtime", "-m", "megatron_hybrid.cli", "data", "tokenize"]
NULL = ["--tokenizer-type", "null", "--vocab-size", "1000"]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command; what it imported goes to stderr too."""
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)


def test_defaults(tmp_path: Path) -> None:
    """Several inputs, as a shell expands them: shuffled, ended, in PREFIX.bin; without torch."""
    inputs = [write_lines(tmp_path / f"{n}.jsonl", [[n, m] for m in range(50)]) for n in range(3)]
    result = run("--input", *inputs, "--output", tmp_path / "sub" / "web", *NULL)
    assert result.returncode == 0, result.stderr
    assert " torch" not in result.stderr
    assert f"{tmp_path}/sub/web.bin: 150 documents, 450 tokens, 0 empty" in result.stdout
    assert "150 lines, 0 rejected; 0.0 MB in" in result.stdout
    found = documents(tmp_path / "sub" / "web")
    expected = [[n, m, 999] for n in range(3) for m in range(50)]
    assert found != expected
    assert sorted(found) == expected
    facts = read_facts(tmp_path / "sub" / "web")
    assert facts is not None
    assert (facts.append_eod, facts.shuffle_seed) == (True, 1234)
    plain = run("--input", *inputs, "--output", tmp_path / "plain", *NULL, "--no-shuffle",
                "--no-append-eod")  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    assert documents(tmp_path / "plain") == [document[:2] for document in expected]


def test_errors_are_text(tmp_path: Path) -> None:
    """Wrong flags and bad lines end the command with code 1 and one message."""
    wrong = run("--input", tmp_path / "no.jsonl", "--output", tmp_path / "web", "--workers", "0",
                "--tokenizer-type", "huggingface", "--vocab-size", "9")  # fmt: skip
    message = wrong.stderr[wrong.stderr.index("error:") :]
    assert wrong.returncode == 1
    assert message.startswith("error: 4 problems:\n  - --workers 0")
    assert "--vocab-size 9 is only for --tokenizer-type null" in message
    assert "Traceback" not in message
    used = TokenizeSettings(("x",), {"text": tmp_path / "y"}, tmp_path / "z", "null", Path("m"), 9)
    with pytest.raises(DataError, match="--tokenizer-model m is of no use to --tokenizer-type nu"):
        check(used)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"content": "1"}) + "\n")
    bad = run("--input", path, "--output", tmp_path / "web", *NULL)
    assert bad.returncode == 1
    assert "key 'text' is missing" in bad.stderr
    assert [file.name for file in tmp_path.glob("web*")] == ["web_rejected.jsonl"]
