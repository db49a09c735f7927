"""Tokenizers behind one small interface: sentencepiece, Hugging Face, and ids written as text.

Document text never becomes a control id: a literal `</s>` in a web page is encoded as the
characters it is made of. sentencepiece does so by itself for its CONTROL pieces; `tokenizers`
does when told (`encode_special_tokens`). Symbols that a tokenizer declares as ordinary text
(USER_DEFINED pieces, added tokens that are not special) stay single tokens, as they were meant.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.fileio import write_atomic

TOKENIZER_TYPES = ("sentencepiece", "huggingface", "null")

# Asked, in this order of families, when no tokenizer_config.json names the end token.
_COMMON_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: ids lie in `[0, vocab_size)`.
        eod: the id that ends a document; `encode` never yields it.
        fingerprint: sha256 (hex) of the tokenizer's file.
    """

    file_name: str
    vocab_size: int
    eod: int
    fingerprint: str

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self.fingerprint = hashlib.sha256(files[self.file_name]).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin or end markers."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""

    def save_copy(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder`, byte for byte as it was read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            write_atomic(folder / name, content)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`; `eod` is its eos piece."""

    file_name = "tokenizer.model"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        content = _read(path)
        super().__init__({self.file_name: content})
        try:
            self._processor = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"data.tokenizer_model={path} is not a sentencepiece model: {error}"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise DataError(
                f"data.tokenizer_model={path} has no eos piece, which must end documents; "
                "train it with eos_id >= 0"
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds one.

    `eod` is the `eos_token` of the `tokenizer_config.json` beside it; without that file, the one
    special token with a usual name for it.
    """

    file_name = "tokenizer.json"
    config_name = "tokenizer_config.json"

    def __init__(self, path: Path) -> None:
        import tokenizers

        path = path / self.file_name if path.is_dir() else path
        files = {self.file_name: _read(path)}
        config_path = path.with_name(self.config_name)
        if config_path.is_file():
            files[self.config_name] = config_path.read_bytes()
        super().__init__(files)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files[self.file_name])
        except ValueError as error:
            raise DataError(
                f"data.tokenizer_model={path} is not a tokenizer.json: {error}"
            ) from error
        # A file may carry the truncation and padding of its last use: both would lose or add text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        # Not the count of tokens: ids may have holes.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = self._find_eod(path)

    def _find_eod(self, path: Path) -> int:
        special = {
            token.content: token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        named = self._end_token_of_config(path)
        if named is not None:
            if named not in special:
                raise DataError(
                    f"eos_token={named!r} in {path.with_name(self.config_name)} must be a special "
                    f"token of {path}; special there: {', '.join(special) or 'none'}"
                )
            return special[named]
        usual = [token for token in _COMMON_END_TOKENS if token in special]
        if len(usual) != 1:
            raise DataError(
                f"cannot tell which token of data.tokenizer_model={path} ends a document "
                f"(candidates: {', '.join(usual) or 'none'}); put a {self.config_name} with "
                f'"eos_token" beside it; special tokens: {", ".join(special) or "none"}'
            )
        return special[usual[0]]

    def _end_token_of_config(self, path: Path) -> str | None:
        if self.config_name not in self._files:
            return None
        try:
            token = json.loads(self._files[self.config_name]).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{path.with_name(self.config_name)} is not a JSON object: {error}"
            ) from error
        return token["content"] if isinstance(token, dict) else token

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class NullTokenizer(Tokenizer):
    """Text that already is ids, separated by spaces; `eod` is the last id of the vocabulary."""

    file_name = "null_tokenizer.json"

    def __init__(self, vocab_size: int) -> None:
        super().__init__({self.file_name: json.dumps({"vocab_size": vocab_size}).encode()})
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"data.tokenizer_type=null needs ids separated by spaces: {error}"
            ) from error
        outside = next((token for token in ids if not 0 <= token < self.eod), None)
        if outside is not None:
            raise DataError(
                f"data.tokenizer_type=null: id {outside} must lie in 0 … {self.eod - 1} "
                f"(model.vocab_size={self.vocab_size}, its last id ends documents)"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: Path | None, *, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of `data.tokenizer_type` and `data.tokenizer_model`.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`.
        tokenizer_model: a sentencepiece `.model`, a `tokenizer.json` or its folder; unused by null.
        vocab_size: `model.vocab_size`; only null needs it.

    Raises:
        DataError: the file is missing or not of that type, or names no document end.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise DataError(
            f"data.tokenizer_type={tokenizer_type} is unknown; allowed: "
            f"{', '.join(TOKENIZER_TYPES)}"
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
    return HuggingFaceTokenizer(Path(tokenizer_model))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save_copy` wrote into `folder`.

    Raises:
        DataError: the folder holds none.
    """
    if (folder / SentencePieceTokenizer.file_name).is_file():
        return SentencePieceTokenizer(folder / SentencePieceTokenizer.file_name)
    if (folder / HuggingFaceTokenizer.file_name).is_file():
        return HuggingFaceTokenizer(folder)
    null_path = folder / NullTokenizer.file_name
    if null_path.is_file():
        return NullTokenizer(json.loads(null_path.read_bytes())["vocab_size"])
    raise DataError(f"{folder} holds no tokenizer")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read data.tokenizer_model={path}: {error.strerror}") from error
