"""From text to ids: those of the tokenizer itself, in the engine's own files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import indexed_paths
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from megatron_hybrid.data.tokenizing.encoder import Encoder
from megatron_hybrid.data.tokenizing.settings import check
from tests.data.conftest import TEXTS, write_jsonl
from tests.data.tokenizing.samples import documents, rejected, settings_in


@pytest.fixture(params=["huggingface", "sentencepiece"])
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, fast_tokenizer: Path, sentencepiece_model: Path
) -> TokenizeSettings:
    write_jsonl(tmp_path / "in.jsonl", [f"{n} {TEXTS[n % len(TEXTS)]}" for n in range(60)])
    model = fast_tokenizer if request.param == "huggingface" else sentencepiece_model
    return settings_in(
        tmp_path, tokenizer_type=request.param, tokenizer_model=model, vocab_size=None
    )


def texts_of(settings: TokenizeSettings) -> list[str]:
    return [json.loads(line)["text"] for line in Path(settings.inputs[0]).read_text().splitlines()]


def write_with_the_engine(prefix: Path, rows: list[list[int]], vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(vocab_size))
    for row in rows:
        builder.add_item(torch.tensor(row))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("append_eod", [False, True])
def test_bytes_are_the_engines(settings: TokenizeSettings, append_eod: bool) -> None:
    """.bin and .idx equal what IndexedDatasetBuilder writes for the ids of each single text."""
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model)
    end = [tokenizer.eod] if append_eod else []
    rows = [[*tokenizer.encode(text), *end] for text in texts_of(settings)]
    prefix = settings.outputs["text"]
    expected = prefix.with_name("expected")
    write_with_the_engine(expected, rows, tokenizer.vocab_size)
    facts = tokenize(replace(settings, append_eod=append_eod)).facts["text"]
    for ours, theirs in zip(indexed_paths(prefix), indexed_paths(expected), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert facts.append_eod == append_eod
    assert facts.highest_token == max(map(max, rows))
    assert facts.tokenizer.fingerprint == tokenizer.fingerprint
    assert (facts.tokenizer.vocab_size, facts.tokenizer.eod) == (
        tokenizer.vocab_size,
        tokenizer.eod,
    )


def test_special_tokens_in_text(settings: TokenizeSettings) -> None:
    """`</s>` in a page is text; its id appears in a document only where that is asked for."""
    eod = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model).eod
    tokenize(settings)
    assert not any(eod in document for document in documents(settings.outputs["text"]))
    parsing = replace(settings, parse_special_tokens=True)
    if settings.tokenizer_type == "sentencepiece":
        message = "--parse-special-tokens needs --tokenizer-type=huggingface; it is sentencepiece"
        with pytest.raises(DataError, match=message):
            tokenize(parsing)
        return
    facts = tokenize(parsing).facts["text"]
    found = [eod in document for document in documents(settings.outputs["text"])]
    assert found == ["</s>" in text for text in texts_of(settings)]
    assert facts.tokenizer.parse_special_tokens


def test_encoders_agree(tmp_path: Path, fast_tokenizer: Path) -> None:
    """The fast library is chosen by itself, and writes what tokenizers writes."""
    write_jsonl(tmp_path / "in.jsonl", TEXTS * 20)
    found = {}
    for encoder in ("auto", "fastokens", "tokenizers"):
        settings = settings_in(
            tmp_path, tokenizer_type="huggingface", tokenizer_model=fast_tokenizer,
            vocab_size=None, encoder=encoder, workers=2,
        )  # fmt: skip
        tokenize(settings)
        found[encoder] = documents(tmp_path / "out")
    assert found["auto"] == found["fastokens"] == found["tokenizers"]
    ids = replace(settings, tokenizer_type="null", tokenizer_model=None, vocab_size=10)
    with pytest.raises(DataError, match="--encoder=fastokens needs --tokenizer-type=huggingface"):
        tokenize(replace(ids, encoder="fastokens"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_model": "missing"}, "cannot read --tokenizer-model=missing: No such file"),
        ({"tokenizer_type": "sentencepiece"}, "--tokenizer-model=.* is not a sentencepiece model"),
        ({"tokenizer_model": None}, "needs --tokenizer-model; it is unset"),
        ({"tokenizer_type": "null"}, "--tokenizer-type=null needs --vocab-size >= 2; it is None"),
    ],
)
def test_wrong_tokenizer(
    tmp_path: Path, fast_tokenizer: Path, changes: dict[str, Any], message: str
) -> None:
    """A tokenizer that cannot be opened is refused in the words of the flags."""
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    settings = settings_in(
        tmp_path, tokenizer_type="huggingface", vocab_size=None,
        tokenizer_model=fast_tokenizer / "tokenizer.json",
    )  # fmt: skip
    if isinstance(changes.get("tokenizer_model"), str):
        changes = {"tokenizer_model": Path(changes["tokenizer_model"])}
    with pytest.raises(DataError, match=message):
        tokenize(replace(settings, **changes))
    assert list(tmp_path.glob("out*")) == []


def test_tokenizer_that_changes(
    tmp_path: Path, fast_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer's file that is replaced before the workers read it is noticed."""
    copy = tmp_path / "tokenizer"
    shutil.copytree(fast_tokenizer, copy)
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    settings = settings_in(
        tmp_path, tokenizer_type="huggingface", tokenizer_model=copy, vocab_size=None, workers=2
    )

    def check_and_replace(settings: TokenizeSettings) -> Any:
        checked = check(settings)
        (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
        return checked

    monkeypatch.setattr("megatron_hybrid.data.tokenizing.pipeline.check", check_and_replace)
    with pytest.raises(DataError, match=r"--tokenizer-model .* changed meanwhile; nothing was"):
        tokenize(settings)


def test_ids_beyond_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that the tokenizer should not have given never reaches a file."""
    tokenizer = build_tokenizer("null", None, vocab_size=100)
    encoder = Encoder(tokenizer, ["text"], append_eod=False)
    write_jsonl(tmp_path / "in.jsonl", ["1 2", "98", "3"])
    tokenizer.vocab_size = 50  # a broken tokenizer: 98 is beyond its vocabulary
    monkeypatch.setattr(
        "megatron_hybrid.data.tokenizing.pipeline.encode_in_order",
        lambda chunks, *_: ((chunk, encoder.encode(chunk.payload)) for chunk in chunks),
    )
    settings = settings_in(tmp_path)
    tokenize(settings)
    assert documents(tmp_path / "out") == [[1, 2], [3]]
    reasons = [entry["reason"] for entry in rejected(settings)]
    assert reasons == ["the tokenizer gave id 98; its vocabulary has 50"]
