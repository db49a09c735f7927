"""Tokenizers behind one small interface: sentencepiece, Hugging Face, and ids written as text.

Document text never becomes a control id, unless that is asked for: a literal `</s>` in a web page
is encoded as the characters it is made of. sentencepiece does so by itself for its CONTROL pieces;
`tokenizers` does when told (`encode_special_tokens`). Symbols that a tokenizer declares as ordinary
text (USER_DEFINED pieces, added tokens that are not special) stay single tokens, as they were
meant.
"""

from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer.base import ENCODERS, Tokenizer
from megatron_hybrid.data.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_hybrid.data.tokenizer.null import NullTokenizer
from megatron_hybrid.data.tokenizer.sentence_piece import SentencePieceTokenizer
from megatron_hybrid.small_files import read_json

__all__ = [
    "ENCODERS",
    "TOKENIZER_TYPES",
    "NullTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "holds_tokenizer",
    "load_tokenizer",
]

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "null")


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: Path | None,
    *,
    vocab_size: int | None = None,
    parse_special_tokens: bool = False,
) -> Tokenizer:
    """The tokenizer of `data.tokenizer_type` and `data.tokenizer_model`.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`.
        tokenizer_model: a sentencepiece `.model`, a `tokenizer.json` or its folder; unused by null.
        vocab_size: `model.vocab_size`; only null needs it.
        parse_special_tokens: let the text of a special token become its id; huggingface only.

    Raises:
        DataError: the file is missing or not of that type, or names no document end.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise DataError(
            f"data.tokenizer_type={tokenizer_type} is unknown; allowed: "
            f"{', '.join(TOKENIZER_TYPES)}"
        )
    if parse_special_tokens and tokenizer_type != "huggingface":
        raise DataError(
            f"parse_special_tokens needs data.tokenizer_type=huggingface; it is {tokenizer_type}, "
            "which has no way to find special tokens in text"
        )
    if tokenizer_type == "null":
        if vocab_size is None or vocab_size < 2:
            raise DataError(
                f"data.tokenizer_type=null needs model.vocab_size >= 2; it is {vocab_size}"
            )
        return NullTokenizer(vocab_size)
    if tokenizer_model is None:
        raise DataError(
            f"data.tokenizer_type={tokenizer_type} needs data.tokenizer_model; it is unset"
        )
    if tokenizer_type == "sentencepiece":
        return SentencePieceTokenizer(Path(tokenizer_model))
    return HuggingFaceTokenizer(Path(tokenizer_model), parse_special_tokens)


def holds_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` finds one."""
    kinds = (SentencePieceTokenizer, HuggingFaceTokenizer, NullTokenizer)
    return any((folder / kind.file_name).is_file() for kind in kinds)


def load_tokenizer(folder: Path, *, parse_special_tokens: bool = False) -> Tokenizer:
    """The tokenizer that `save_copy` wrote into `folder`.

    Args:
        parse_special_tokens: let the text of a special token become its id; huggingface only.

    Raises:
        DataError: the folder holds none, or it cannot find special tokens in text.
    """
    kinds = (SentencePieceTokenizer, HuggingFaceTokenizer, NullTokenizer)
    kind = next((kind for kind in kinds if (folder / kind.file_name).is_file()), None)
    if kind is None:
        raise DataError(f"{folder} holds no tokenizer")
    path = folder / kind.file_name
    if kind is HuggingFaceTokenizer:
        return HuggingFaceTokenizer(folder, parse_special_tokens)
    if parse_special_tokens:
        raise DataError(
            f"--parse-special-tokens needs a {HuggingFaceTokenizer.file_name}; {folder} holds "
            f"{kind.file_name}, which has no way to find special tokens in text"
        )
    if kind is SentencePieceTokenizer:
        return SentencePieceTokenizer(path)
    vocab_size = read_json(path, DataError, fields=("vocab_size",)).get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 2:
        raise DataError(f"{path} is damaged: vocab_size={vocab_size!r}")
    return NullTokenizer(vocab_size)
