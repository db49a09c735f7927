"""`data show`: the text and the ids of documents, and of no others; how files are named."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from megatron_hybrid.cli import app
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.inspection.prefixes import find_prefixes
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from tests.data.conftest import TEXTS, write_corpus, write_jsonl
from tests.data.tokenizer_files import FAST_KINDS, save_kind


@pytest.fixture
def pair(tmp_path: Path, sentencepiece_model: Path) -> Path:
    tokenize(
        TokenizeSettings(
            inputs=(str(write_jsonl(tmp_path / "in.jsonl", TEXTS)),),
            outputs={"text": tmp_path / "web.v1"},
            rejected_path=tmp_path / "rejected.jsonl",
            tokenizer_type="sentencepiece",
            tokenizer_model=sentencepiece_model,
        )
    )
    return tmp_path / "web.v1"


def show(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "show", *map(str, arguments)])


def test_text_and_ids(pair: Path, sentencepiece_model: Path) -> None:
    """Documents come back as they went in, in the order asked for; ids with their end token."""
    result = show(pair, 2, 0, "--tokenizer-model", sentencepiece_model)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{TEXTS[2]}\n{TEXTS[0]}\n"
    tokenizer = build_tokenizer("sentencepiece", sentencepiece_model)
    tokenizer.save_copy(pair.parent / "checkpoint")
    assert show(pair, 2, 0, "--tokenizer-model", pair.parent / "checkpoint").stdout == result.stdout
    ids = [*tokenizer.encode(TEXTS[1]), tokenizer.eod]
    assert result.stderr.count("tokens") == 2
    assert show(f"{pair}.bin", 1, "--tokens").stdout == " ".join(map(str, ids)) + "\n"


def test_other_tokenizer(pair: Path, tmp_path: Path, sentencepiece_model: Path) -> None:
    """A tokenizer of another fingerprint is refused, and none is an error that says which."""
    other = tmp_path / "other.model"
    # Another file for the same pieces: an unknown field at the end is not read.
    other.write_bytes(sentencepiece_model.read_bytes() + b"\xba\x3e\x01x")
    fingerprints = [
        build_tokenizer("sentencepiece", path).fingerprint[:12]
        for path in (sentencepiece_model, other)
    ]
    assert str(show(pair, 0, "--tokenizer-model", other).exception) == (
        f"{pair} was made with another tokenizer, sentencepiece with the fingerprint "
        f"{fingerprints[0]}…, than the one given ({fingerprints[1]}…)"
    )
    assert str(show(pair, 0).exception) == (
        "to show text, give its --tokenizer-model, or --tokens for ids: sentencepiece with the "
        f"fingerprint {fingerprints[0]}… made {pair}"
    )


def test_the_kind_that_is_asked_for(pair: Path, tmp_path: Path, sentencepiece_model: Path) -> None:
    """A folder's other tokenizer is not taken in its place; facts of ids hide no file."""
    save_kind(FAST_KINDS["gpt2"](), tmp_path / "fast")
    found = show(pair, 0, "--tokenizer-model", tmp_path / "fast", "--tokenizer-type",
                 "sentencepiece")  # fmt: skip
    assert "fast/tokenizer.model" in str(found.exception)
    facts = Path(f"{pair}.meta.json")
    facts.write_text(facts.read_text().replace('"sentencepiece"', '"null"'))
    assert show(pair, 2, "--tokenizer-model", sentencepiece_model).stdout == f"{TEXTS[2]}\n"


@pytest.mark.parametrize("number", [-1, 4, 2**53])
def test_no_such_document(pair: Path, number: int) -> None:
    """Numbers below 0 and above the last are refused with what is allowed."""
    result = show(pair, 0, number, "--tokens")
    assert isinstance(result.exception, DataError)
    assert str(result.exception) == f"{pair}.idx: there is no document {number}; allowed: 0 … 3"
    assert result.stdout == ""


def test_ids_as_text_need_no_tokenizer(tmp_path: Path) -> None:
    """Facts are all there is to know of ids that were written as text."""
    tokenize(
        TokenizeSettings(
            inputs=(str(write_jsonl(tmp_path / "in.jsonl", ["1 2 3"])),),
            outputs={"text": tmp_path / "ids"},
            rejected_path=tmp_path / "rejected.jsonl",
            tokenizer_type="null",
            tokenizer_model=None,
            vocab_size=100,
        )
    )
    assert show(tmp_path / "ids", 0).stdout == "1 2 3\n"


def test_damaged_place_and_id(tmp_path: Path, sentencepiece_model: Path) -> None:
    """A place outside the file, and an id that the tokenizer does not have, are named."""
    prefix = Path(write_corpus(tmp_path / "plain", [[5, 6], [900], [7]]))
    result = show(prefix, 1, "--tokenizer-model", sentencepiece_model)
    last = build_tokenizer("sentencepiece", sentencepiece_model).vocab_size - 1
    assert str(result.exception) == (
        f"document 1, token 0: id 900 is outside the tokenizer's vocabulary (0 … {last})"
    )
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[34 + 12 : 34 + 20] = np.int64(6).tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    assert str(show(prefix, 0, "--tokens").exception) == (
        f"{prefix}.idx is damaged: document 0 would be 2 tokens at byte 6 of 8; "
        "`megatron-hybrid data verify` says more"
    )


def test_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, their files and globs of either name the same pairs, each once, in order."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.v1", "a", "[x]", "a.bin"):
        write_corpus(Path(name), [[1]])
    assert find_prefixes(["a"]) == [Path("a")]
    assert find_prefixes(["b.v1.idx", "b.v1.bin", "b.v1", "b.v1.meta.json"]) == [Path("b.v1")]
    assert find_prefixes(["a.bin"]) == [Path("a.bin")]
    assert find_prefixes(["a.bin.bin"]) == [Path("a.bin")]
    assert find_prefixes(["[x]"]) == [Path("[x]")]
    assert find_prefixes(["[ab]*"]) == [Path("a"), Path("a.bin"), Path("b.v1")]
    assert find_prefixes(["b*.idx", "a"]) == [Path("b.v1"), Path("a")]
    Path("a.idx").unlink()
    assert find_prefixes(["a*"]) == [Path("a"), Path("a.bin")]
    with pytest.raises(DataError, match=r"no indexed files at c, d\*: there must be a \.bin"):
        find_prefixes(["a", "c", "d*"])
