"""`encode_batch` gives what `encode` gives, with every library, for every kind of tokenizer."""

import logging
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import token_dtype
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from tests.data.conftest import TEXTS
from tests.data.tokenizer_files import FAST_KINDS, SLOW_KINDS, SPECIAL, save_kind

# By kind, and whether special tokens in text become their ids.
FastTokenizer = Callable[[str, bool], Tokenizer]
PIECES = (
    *SPECIAL, "<s", "|im_start|", "im_start", "<mask>", " <mask>", "<r>", "<r>  ", "<tool_call>",
    "word", "words", "a word ", "Hello", "HELLO", "e\u0301", "é", "\u0301", "\u212b", "ﬁ", "½", "Ⅷ",
    "the", " the", "I'm", "'S", "'ll", "1", "1234567", "==", "/*", "__init__", " ", "  ", "\n",
    "\n\n", "\r\n", "\t", "\v", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\0",
    "\x1f", "\x7f", "\ue000", "\U0010ffff", "\u0378", "東京", "の", "한국", "ก็", "हिन्दी", "🙂",
    "👩‍👩‍👧", "🇩🇪", "▁", "▁the", "Ġ", "<0x0A>", "x" * 70,
)  # fmt: skip
HARD_TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.text(max_size=25),
    st.builds(lambda run, count, end: run * count + end,
              st.sampled_from([" ", "\n", "\r\n", "\t ", "ab", ".", "é", "東"]),
              st.integers(1, 2000), st.sampled_from(["", "x", "\n"])),
)  # fmt: skip


@pytest.fixture(scope="module")
def fast_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    """A tokenizer whose `encode_batch` is fastokens' and whose `encode` is tokenizers'."""

    @cache
    def of_kind(kind: str, parse_special_tokens: bool) -> Tokenizer:
        folder = save_kind(FAST_KINDS[kind](), tmp_path_factory.mktemp("kind"))
        tokenizer = build_tokenizer(
            "huggingface", folder, parse_special_tokens=parse_special_tokens
        )
        assert tokenizer.select_encoder("fastokens") == "fastokens"
        return tokenizer

    return of_kind


def assert_batch_is_exact(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = tokenizer.encode_batch(texts)
    assert ids.dtype == token_dtype(tokenizer.vocab_size)
    assert lengths.dtype == np.int32
    assert int(lengths.sum()) == len(ids)
    rows = np.split(ids, np.cumsum(lengths)[:-1]) if texts else []
    for text, row in zip(texts, rows, strict=True):
        assert row.tolist() == tokenizer.encode(text), ascii(text)


@pytest.mark.parametrize("kind", FAST_KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(HARD_TEXT, max_size=40))
def test_fastokens_is_exact(fast_tokenizer: FastTokenizer, kind: str, texts: list[str]) -> None:
    """Unicode, white space, control and special-token text give tokenizers' ids, both ways."""
    assert_batch_is_exact(fast_tokenizer(kind, False), texts)
    assert_batch_is_exact(fast_tokenizer(kind, True), texts)


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_long_texts(fast_tokenizer: FastTokenizer, kind: str) -> None:
    """Texts beyond the lengths from which fastokens goes other ways inside are exact as well."""
    mixed = "".join(PIECES) * 400
    long = ["x" * 200_000, " " * 20_000, "\n" * 20_000, "ab1 " * 30_000, "東京" * 20_000, mixed]
    assert_batch_is_exact(fast_tokenizer(kind, False), [*long, "", *TEXTS])


def test_special_tokens_in_text(tmp_path: Path) -> None:
    """Their text is text, unless it is to be parsed; this holds for a thousand of them too."""
    tokenizer = FAST_KINDS["llama3"]()
    tokenizer.add_special_tokens([f"<SPECIAL_{number}>" for number in range(1000)])
    folder = save_kind(tokenizer, tmp_path)
    texts = [f"a <SPECIAL_{number}></s>" for number in range(1000)]
    for parse in (False, True):
        tokenizer = build_tokenizer("huggingface", folder, parse_special_tokens=parse)
        assert tokenizer.select_encoder("fastokens", texts[:10]) == "fastokens"
        ids, lengths = tokenizer.encode_batch(texts)
        assert np.count_nonzero(ids == tokenizer.eod) == (1000 if parse else 0)
        assert set(lengths.tolist()) == {4} if parse else lengths.min() > 10  # "a", " ", the two
        assert_batch_is_exact(tokenizer, texts)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_falls_back_with_the_reason(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What fastokens cannot read or does otherwise goes to tokenizers, and the log says why."""
    make, reason = SLOW_KINDS[kind]
    tokenizer = build_tokenizer("huggingface", save_kind(make(), tmp_path))
    with caplog.at_level(logging.INFO):
        assert tokenizer.select_encoder("auto") == "tokenizers"
    (record,) = caplog.records
    assert reason in record.message
    assert_batch_is_exact(tokenizer, [*TEXTS, *PIECES, ""])
    with pytest.raises(DataError, match="encoder=fastokens cannot be used") as error:
        tokenizer.select_encoder("fastokens")
    assert reason in str(error.value)


@pytest.mark.parametrize("parse_special_tokens", [False, True])
def test_hard_texts_find_known_differences(
    parse_special_tokens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were texts with such added tokens not left to tokenizers, the check would find it."""
    monkeypatch.setattr(
        "megatron_hybrid.data.tokenizer.fast._left_to_tokenizers", lambda reference: None
    )
    folder = save_kind(FAST_KINDS["added tokens"](), tmp_path)
    tokenizer = build_tokenizer("huggingface", folder, parse_special_tokens=parse_special_tokens)
    with pytest.raises(DataError, match="its ids differ from those of tokenizers for"):
        tokenizer.select_encoder("fastokens")


class Wrapped:
    """fastokens' Tokenizer, but for the texts on which `wrong` calls."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def encode_batch_flat(self, texts: list[str], **options: Any) -> tuple[bytes, bytes]:
        if any("boom" in text for text in texts):
            raise ValueError("match limit exceeded")
        return self.inner.encode_batch_flat([text.replace("z", "y") for text in texts], **options)


@pytest.fixture
def wrong_on_z(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fastokens that takes a z for a y, and gives up on a boom."""
    import fastokens

    class Module(Wrapped):
        @staticmethod
        def from_json_str(content: str) -> Wrapped:
            return Wrapped(real.from_json_str(content))

    real = fastokens.Tokenizer
    monkeypatch.setattr(fastokens, "Tokenizer", Module)
    monkeypatch.setattr(
        "megatron_hybrid.data.tokenizer.hugging_face.hard_texts", lambda added: ["easy", *added]
    )


def test_sample_of_the_input_decides(
    wrong_on_z: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A difference that only the input shows is found in its sample, and is shown."""
    tokenizer = build_tokenizer("huggingface", save_kind(FAST_KINDS["llama3"](), tmp_path))
    assert tokenizer.select_encoder("auto", ["a sample"]) == "fastokens"
    assert tokenizer.select_encoder("auto", ["a sample", "a zebra"]) == "tokenizers"
    assert "its ids differ from those of tokenizers for 'a zebra'" in caplog.text
    assert_batch_is_exact(tokenizer, ["a zebra"])


def test_failure_while_encoding(
    wrong_on_z: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts on which fastokens gives up are encoded by tokenizers, and the log says so."""
    tokenizer = build_tokenizer("huggingface", save_kind(FAST_KINDS["llama3"](), tmp_path))
    tokenizer.select_encoder("fastokens")
    assert_batch_is_exact(tokenizer, ["a boom", "", "and more"])
    assert "encoding 3 texts with tokenizers: match limit exceeded" in caplog.text


def test_without_fastokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is not installed, "auto" says so and does without; asked for, it is an error."""
    tokenizer = build_tokenizer("huggingface", save_kind(FAST_KINDS["gpt2"](), tmp_path))
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert tokenizer.select_encoder("auto") == "tokenizers"
    assert "cannot be imported" in caplog.text
    with pytest.raises(DataError, match="cannot be imported"):
        tokenizer.select_encoder("fastokens")


def test_other_tokenizers(sentencepiece_model: Path) -> None:
    """Batches of the others are exact; they have no choice of libraries and parse nothing."""
    pieces = build_tokenizer("sentencepiece", sentencepiece_model)
    assert_batch_is_exact(pieces, [*TEXTS, *PIECES, ""])
    numbers = build_tokenizer("null", None, vocab_size=70_000)
    assert_batch_is_exact(numbers, ["1 2 3", "", "69998"])
    assert_batch_is_exact(numbers, [])
    for tokenizer in (pieces, numbers):
        assert tokenizer.select_encoder("auto") == "auto"
        with pytest.raises(DataError, match="encoder=tokenizers needs data"):
            tokenizer.select_encoder("tokenizers")
        with pytest.raises(DataError, match="encoder=fast is unknown; allowed: auto"):
            tokenizer.select_encoder("fast")
    with pytest.raises(DataError, match="parse_special_tokens needs data"):
        build_tokenizer("sentencepiece", sentencepiece_model, parse_special_tokens=True)


@pytest.mark.parametrize("encoder", ["fastokens", "tokenizers"])
def test_one_thread(encoder: str, tmp_path: Path) -> None:
    """A process that encodes has a single thread, though the libraries would start one a core."""
    folder = save_kind(FAST_KINDS["llama3"](), tmp_path)
    program = f"""
import os
from pathlib import Path
from megatron_hybrid.data.tokenizer import build_tokenizer
tokenizer = build_tokenizer("huggingface", Path({str(folder)!r}))
tokenizer.select_encoder({encoder!r})
tokenizer.encode_batch(["some text, and more " * 20_000] * 8)
print(len(os.listdir("/proc/self/task")))
"""
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "1\n"
