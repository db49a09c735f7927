"""`tokenizer.json` files of the kinds that models have, trained in a second each."""

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"]
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = [
    Path(json.__file__).read_text(),
    Path(json.decoder.__file__).read_text(),
    "naïve café Ünïcödé 🙂👩‍👩‍👧 東京 日本語のテキスト 한국어 текст на русском العربية हिन्दी ไทย "
    * 20,
]


def _byte_level(*regexes: str) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regexes)
    return pre_tokenizers.Sequence([*splits, letters])


def _byte_bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    added: tuple[str | AddedToken, ...] = (),
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    for token in added:
        is_special = isinstance(token, AddedToken) and token.special
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
    return tokenizer


def _metaspace_bpe() -> tokenizers.Tokenizer:
    bpe = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _llama2() -> tokenizers.Tokenizer:
    """Metaspace by normalisation, with no pre-tokeniser at all, and a decoder in parts."""
    parts = json.loads(_metaspace_bpe().to_str())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    begin = {"type": "Prepend", "prepend": "▁"}
    parts["normalizer"] = {"type": "Sequence", "normalizers": [begin, spaces]}
    parts["pre_tokenizer"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def _unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def _with_added_tokens() -> tokenizers.Tokenizer:
    """Added tokens of all sorts, some with flags, some overlapping special ones."""
    return _byte_bpe(
        _byte_level(_LLAMA3),
        added=(
            "  ",
            "<tool_call>",
            "im_start",
            AddedToken("word", single_word=True),
            AddedToken("<mask>", lstrip=True, special=True),
            AddedToken("<r>", rstrip=True, special=True),
        ),
    )


# What fastokens encodes as tokenizers does.
FAST_KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": lambda: _byte_bpe(_byte_level()),
    "gpt2 with a prefix space": lambda: _byte_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: _byte_bpe(_byte_level(_LLAMA3), ignore_merges=True),
    "tekken": lambda: _byte_bpe(_byte_level(_TEKKEN)),
    "qwen": lambda: _byte_bpe(_byte_level(_LLAMA3), normalizers.NFC(), ("e\u0301", "Hello")),
    "deepseek": lambda: _byte_bpe(
        _byte_level(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)  # noqa: RUF001
    ),
    "llama2": _llama2,
    "added tokens": _with_added_tokens,
}
# And what not, with the reason.
SLOW_KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "unigram": (_unigram, "unsupported pre-tokenizer type: Metaspace"),
    "metaspace": (_metaspace_bpe, "unsupported pre-tokenizer type: Metaspace"),
    "normalised whole word": (
        lambda: _byte_bpe(
            _byte_level(_LLAMA3), normalizers.Lowercase(), (AddedToken("word", single_word=True),)
        ),
        "may match 'word' in normalised text otherwise than tokenizers",
    ),
}


def save_kind(tokenizer: tokenizers.Tokenizer, folder: Path) -> Path:
    """Write the files of a tokenizer whose documents end with `</s>`; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder
