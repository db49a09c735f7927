"""Tokenizers give text back, keep control ids out of documents, and explain what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_tokenizer,
)
from megatron_hybrid.data.tokenizer.losses import Losses
from megatron_hybrid.data.tokenizing.chunks import Lines
from megatron_hybrid.data.tokenizing.encoder import Encoder
from tests.data.conftest import TEXTS, write_jsonl

SPECIAL = ["</s>", "<|im_start|>"]


@pytest.fixture(scope="module")
def huggingface_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that was saved with truncation and padding switched on."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer(
    request: pytest.FixtureRequest, sentencepiece_model: Path, huggingface_folder: Path
) -> Tokenizer:
    paths = {"sentencepiece": sentencepiece_model, "huggingface": huggingface_folder}
    return build_tokenizer(request.param, paths[request.param])


@pytest.mark.parametrize("text", [*TEXTS, "", "\n", "x" * 5000])
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """decode(encode(text)) is text: nothing normalised, cut (truncation) or added (padding)."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # which comes in any order
BYTES = [f"<0x{byte:02X}>" for byte in range(0xF5)]  # beyond are none of UTF-8
# Vocabulary, what the model has besides, how texts are cut; whether anything can be lost.
BYTE_PAIRS: dict[str, tuple[list[str], dict[str, Any], Any, bool]] = {
    "characters": (list("ab c"), {}, None, True),
    "an unknown token": (["a", "b", "?"], {"unk_token": "?"}, None, False),
    "bytes": (["a", *BYTES], {"byte_fallback": True}, None, False),
    "some bytes": (["a", *BYTES[:99]], {"byte_fallback": True}, None, True),
    "cut into bytes": (
        [each for each in ALPHABET if each not in "ÀÁõ÷ÿ"], {},
        pre_tokenizers.ByteLevel(add_prefix_space=False), False,
    ),
    "cut into some bytes": (
        ALPHABET[:99], {}, pre_tokenizers.ByteLevel(add_prefix_space=False), True,
    ),
    "words": (["a", "b</w>", "a</w>", "b"], {"end_of_word_suffix": "</w>"},
              pre_tokenizers.Whitespace(), True),
    "a mark for blanks": (list("ab▁"), {}, pre_tokenizers.Metaspace(), True),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTE_PAIRS)
def test_characters_without_ids_are_found(name: str) -> None:
    """Where, and only where, the library leaves out a part of the text, and with each of them."""
    vocabulary, options, cut, loses = BYTE_PAIRS[name]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [], **options))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.Split("\0", "isolated")
    losses = Losses.find(tokenizer)
    assert (losses is not None) == loses
    for text in ("ab", "a b", "ax b", "é", "日 a", "abé"):
        kept = [token.removesuffix("</w>") for token in tokenizer.encode(text).tokens]
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if losses is not None:
            problem = losses.problem(text)
            assert (problem is None) == ("".join(kept) == "".join(pieces)), text
            lost = set("xé日").intersection("".join(pieces)).difference(vocabulary)
            assert problem is None or all(repr(each) in problem for each in lost)


def test_a_text_that_would_lose_characters_is_rejected(tmp_path: Path) -> None:
    """It goes to the rejected lines, with the characters; added tokens are found whole."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = build_tokenizer("huggingface", tmp_path)
    ids, lengths = ours.encode_batch(["ab", "a<tool>b"])
    assert (ids.tolist(), lengths.tolist()) == ([0, 1, 0, 3, 1], [2, 3])
    for text in ("aéb", "a</s>"):
        with pytest.raises(DataError, match=r"has no ids for .*: they would be left out"):
            ours.encode_batch(["ab", text])
    path = write_jsonl(tmp_path / "in.jsonl", ["ab", "aéb", "b"])
    encoded = Encoder(ours, ["text"], append_eod=True).encode(Lines(path.read_bytes()))
    assert [rejected.line for rejected in encoded.rejected] == [2]
    assert encoded.documents[0].lengths.tolist() == [3, 2]


def test_ids_that_it_does_not_have_are_decoded(tokenizer: Tokenizer) -> None:
    """A model may have more rows than the tokenizer has ids, and files hold anything."""
    ids = tokenizer.encode("def f")
    for strange in (tokenizer.vocab_size, 2**31 - 1, -1, -(2**31)):
        text = tokenizer.decode([*ids, strange, *ids])
        assert text.startswith("def f") and text.endswith("def f")


def test_control_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    """A page that spells a control token gets no control id, above all no document end."""
    ids = tokenizer.encode("a </s> b <|im_start|> <s>")
    assert tokenizer.eod not in ids
    assert len(ids) > 10
    assert max(ids) < tokenizer.vocab_size


def test_copy_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a checkpoint carries encodes, ends documents and is fingerprinted the same."""
    tokenizer.save_copy(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.fingerprint, copy.eod, copy.vocab_size) == (
        tokenizer.fingerprint,
        tokenizer.eod,
        tokenizer.vocab_size,
    )
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_null_tokenizer(tmp_path: Path) -> None:
    """Ids as text go both ways; what is no id, or is the document end, is refused."""
    tokenizer = build_tokenizer("null", None, vocab_size=100)
    assert tokenizer.encode("1 2 98") == [1, 2, 98]
    assert tokenizer.decode([1, 2]) == "1 2"
    tokenizer.save_copy(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    for text in ("1 99", "-1", "one"):
        with pytest.raises(DataError, match="null"):
            tokenizer.encode(text)


def test_end_token_without_config(huggingface_folder: Path, tmp_path: Path) -> None:
    """Without tokenizer_config.json the usual name is found; two or none of them is an error."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes((huggingface_folder / "tokenizer.json").read_bytes())
    assert build_tokenizer("huggingface", path).eod == 0
    plain = tokenizers.Tokenizer.from_file(str(path))
    plain.add_special_tokens(["<|endoftext|>"])
    plain.save(str(path))
    with pytest.raises(DataError, match=r"candidates: <\|endoftext\|>, </s>"):
        build_tokenizer("huggingface", path)


@pytest.mark.parametrize("token", [{}, {"content": 5}, {"content": {}}, ["</s>"], 5, True])
def test_a_special_token_that_is_no_text(
    token: object, huggingface_folder: Path, tmp_path: Path
) -> None:
    """Wherever a token is named, what is no text is said with its file."""
    model = (huggingface_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(model)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "</s>", "bos_token": token}))
    tokenizer = HuggingFaceTokenizer(tmp_path)
    with pytest.raises(DataError, match=f"bos_token=.* in {path} must be a text"):
        tokenizer.special_id("bos_token")
    path.write_text(json.dumps({"eos_token": token}))
    with pytest.raises(DataError, match=f"eos_token=.* in {path} must be a text"):
        HuggingFaceTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("sentencepiece", None, "cannot read data.tokenizer_model="),
        ("sentencepiece", b"junk", "is not a sentencepiece model"),
        ("huggingface", b"{}", "is not a tokenizer.json"),
        ("bert", b"", "allowed: sentencepiece, huggingface, null"),
        ("null", b"", "needs model.vocab_size"),
    ],
)
def test_unusable(kind: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    """Each unusable tokenizer gives one sentence that names the field."""
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_tokenizer(kind, path)


def test_sentencepiece_without_eos(tmp_path: Path) -> None:
    """A model that cannot end a document is refused."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path / "no_eos.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 5),
            model_writer=file,
            vocab_size=60,
            hard_vocab_limit=False,
            model_type="bpe",
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(DataError, match="no eos piece"):
        build_tokenizer("sentencepiece", path)


UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}
STUMBLES: dict[str, tuple[dict[str, object], str]] = {
    "no tokens": ({"type": "WordLevel", "vocab": {}, "unk_token": "?"}, "has no tokens"),
    "no such unknown token": (
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "cannot encode a text",
    ),
    "no unknown token": (UNIGRAM, "cannot encode a text"),
    "an unknown token outside": (UNIGRAM | {"unk_id": 9}, r"is not a tokenizer\.json"),
    "a merge that is no token": (
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, r"is not a tokenizer\.json",
    ),
    "an id of 32 bits": (
        {"type": "WordLevel", "vocab": {"a": 0, "?": 2**32 - 1}, "unk_token": "?"},
        "has the id 4294967295; it must have ids from 0 to at most 2147483646",
    ),
    "a negative id": (
        {"type": "WordLevel", "vocab": {"a": 0, "?": -1}, "unk_token": "?"},
        r"is not a tokenizer\.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STUMBLES)
@pytest.mark.parametrize("way", ["text", "batch", "choice"])
def test_what_the_library_stumbles_over_is_said_with_the_file(
    name: str, way: str, tmp_path: Path
) -> None:
    """However a text comes to it, and though it is no Exception of Python's."""
    model, problem = STUMBLES[name]
    eod = {
        "id": 2, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False,
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    added = [] if name == "no tokens" else [eod]
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    with pytest.raises(DataError, match=f"^data.tokenizer_model={path} {problem}"):
        opened = build_tokenizer("huggingface", path)
        if way == "text":
            opened.encode("a zebra")
        elif way == "batch":
            opened.encode_batch(["a", "a zebra"])
        else:
            opened.select_encoder("auto", ["a zebra"])
            opened.encode("a zebra")


def test_what_transformers_begins_texts_with(huggingface_folder: Path, tmp_path: Path) -> None:
    """Is said, as nothing here adds it; of a tokenizer that adds nothing, nothing is said."""
    assert build_tokenizer("huggingface", huggingface_folder).around_texts() is None
    made = tokenizers.Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    name = made.id_to_token(0)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, 0)]
    )
    shutil.copytree(huggingface_folder, tmp_path / "other")
    made.save(str(tmp_path / "other" / "tokenizer.json"))
    said = build_tokenizer("huggingface", tmp_path / "other").around_texts()
    assert said is not None and f"makes {name + 'a'!r} of the text 'a' in transformers" in said


def test_whoever_encodes_texts_for_a_model_says_so() -> None:
    """What transformers begins texts with is told by each command, not by some."""
    told = {
        path.name
        for folder in ("megatron_hybrid", "checkpoints_converter")
        for path in (Path(__file__).parents[2] / folder).rglob("*.py")
        if "around_texts(" in path.read_text() and "def around_texts" not in path.read_text()
    }
    assert told == {
        "options.py", "generate.py", "evaluate.py", "evaluate_tasks.py", "pipeline.py",
        "importing.py",
    }  # fmt: skip
