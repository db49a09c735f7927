"""tools/preprocess_data.py: Megatron-LM's flags and file names on the project's own code."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_hybrid.data.indexed import open_indexed
from tests.warm import python
from tools import preprocess_data

TOOL = preprocess_data.__file__
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


def write_input(path: Path) -> Path:
    records = [{"text": "1 2", "title": "3"}, {"text": "4"}, {"text": "5 6 7", "title": "8"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_command(tmp_path: Path) -> None:
    """One pair a key, in the input's order, no end tokens; a bad line fails it or is listed."""
    command = [python(), TOOL, "--input", str(write_input(tmp_path / "a.jsonl")), *NULL]
    command += ["--output-prefix", str(tmp_path / "out"), "--json-keys", "text", "title"]
    strict = subprocess.run(command, capture_output=True, text=True)
    assert strict.returncode == 1
    assert strict.stderr.startswith("error: 1 of 3 lines are bad, more than --max-rejected-fract")
    assert "line 2 of" in strict.stderr
    assert "Traceback" not in strict.stderr
    lenient = subprocess.run(
        [*command, "--max-rejected-fraction", "0.5", "--partitions", "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert lenient.returncode == 0, lenient.stderr
    assert "--partitions changes nothing" in lenient.stderr
    assert "3 lines, 1 rejected" in lenient.stdout
    assert str(tmp_path / "out_rejected.jsonl") in lenient.stdout
    assert open_indexed(tmp_path / "out_text_document").document_lengths.tolist() == [2, 3]
    assert open_indexed(tmp_path / "out_title_document").document_lengths.tolist() == [1, 1]


def test_flags_of_megatron(tmp_path: Path) -> None:
    """The flags of a command line for Megatron-LM mean the same here."""
    words = ["--input", "a", "b*", "--output-prefix", "out", "--append-eod", "--workers", "3"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json"]
    words += ["--keep-sequential-samples", "--log-interval", "100"]
    settings = preprocess_data.parse(words)
    assert settings.inputs == ("a", "b*")
    assert settings.outputs == {"text": Path("out_text_document")}
    assert (settings.tokenizer_type, settings.append_eod) == ("huggingface", True)
    assert (settings.workers, settings.shuffle_seed) == (3, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shuffle-memory-gib", "3"], "--shuffle-memory-gib: only with --shuffle-seed"),
        (["--split-sentences"], "--split-sentences is not supported: documents are not split"),
        (["--find-optimal-num-workers"], "--find-optimal-num-workers is not supported"),
        (["--json-keys", "a", "a"], "--json-keys a a must name each key once"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "invalid choice: 'GPT2BPETokenizer'"),
        (["--vocab-file", "x"], "unrecognized arguments: --vocab-file x"),
    ],
)
def test_refused_flags(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What would give another result than Megatron-LM's is refused, not ignored."""
    with pytest.raises(SystemExit) as error:
        preprocess_data.parse(["--input", "a", "--output-prefix", "b", *NULL, *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that takes a number refuses each that nobody means, and is named; a float that
    is too large is left to `check`, which knows this machine."""
    options = [
        action for action in preprocess_data._parser()._actions if action.type in (int, float)
    ]
    assert len(options) >= 7
    for option in options:
        whole = (str(10**30), str(-(10**30))) if option.type is int else ()
        for word in ("nan", "inf", "-inf", "1e40", "1e-40", *whole):
            flag = option.option_strings[0]
            words = ["--input", "a", "--output-prefix", "b", *NULL, f"{flag}={word}"]
            with pytest.raises(SystemExit) as error:
                preprocess_data.parse(words)
            assert error.value.code == 2
            assert flag in capsys.readouterr().err
