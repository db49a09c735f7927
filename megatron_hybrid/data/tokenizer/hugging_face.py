"""Hugging Face's `tokenizer.json`."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.bounds import MOST_COUNT
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import token_dtype
from megatron_hybrid.data.tokenizer.base import ENCODERS, Tokenizer, read_tokenizer_file
from megatron_hybrid.data.tokenizer.fast import FastEncoder, FastokensError, joined, use_one_thread
from megatron_hybrid.data.tokenizer.hard_texts import hard_texts
from megatron_hybrid.data.tokenizer.losses import Losses
from megatron_hybrid.json_text import parse_json

logger = logging.getLogger(__name__)

# What belongs to a tokenizer.json for whoever chats with the model; nothing here reads it.
_COMPANIONS = (
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Asked, in this order of families, when no tokenizer_config.json names the end token.
_COMMON_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


@contextmanager
def _stumbling(path: Path, what: str) -> Iterator[None]:
    """What the library, which is not Python's, stumbles over in a file is said with its name.

    Raises:
        DataError: with its own reason.
    """
    try:
        yield
    except (DataError, FastokensError, MemoryError):
        raise
    except BaseException as error:
        # A panic of Rust's is no Exception, and has no name to be imported by.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"data.tokenizer_model={path} {what}: {error}") from error


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, or the folder that holds one.

    `eod` is the `eos_token` of the `tokenizer_config.json` beside it; without that file, the one
    special token with a usual name for it.

    Args:
        path: of the file or the folder.
        parse_special_tokens: let the text of a special token become its id.
    """

    file_name = "tokenizer.json"
    config_name = "tokenizer_config.json"

    def __init__(self, path: Path, parse_special_tokens: bool = False) -> None:
        use_one_thread()
        import tokenizers

        path = path / self.file_name if path.is_dir() else path
        self._path = path
        files = {self.file_name: read_tokenizer_file(path)}
        for name in (self.config_name, *_COMPANIONS):
            if (beside := path.with_name(name)).is_file():
                files[name] = read_tokenizer_file(beside)
        super().__init__(files)
        with _stumbling(path, "is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(files[self.file_name])
        # A file may carry the truncation and padding of its last use: both would lose or add text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        # Not the count of tokens: ids may have holes.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not 1 <= self.vocab_size <= MOST_COUNT:
            found = f"the id {self.vocab_size - 1}" if ids else "no tokens"
            raise DataError(
                f"data.tokenizer_model={path} has {found}; it must have ids from 0 to at most "
                f"{MOST_COUNT - 1}"
            )
        self.eod = self._find_eod(path)
        self._fast: FastEncoder | None = None
        self._losses = Losses.find(self._tokenizer)

    def _find_eod(self, path: Path) -> int:
        special = {
            token.content: token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        named = self._token_of_config(path, "eos_token")
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

    def special_id(self, name: str) -> int | None:
        """The id of a token that the tokenizer_config.json names, such as "pad_token"."""
        token = self._token_of_config(self._path, name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def parsing_special_tokens(self) -> "HuggingFaceTokenizer":
        """The same tokenizer, with which the text of a special token becomes its id."""
        return HuggingFaceTokenizer(self._path, parse_special_tokens=True)

    @property
    def special_tokens(self) -> list[str]:
        """The texts of tokens that control, rather than say, something."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def named_tokens(self) -> dict[str, str]:
        """Tokens by the names that chat templates know them by, such as "bos_token"."""
        said: dict[str, Any] = {}
        for file in ("special_tokens_map.json", self.config_name):
            found = self._json(file)
            said |= {name: token for name, token in found.items() if name.endswith("_token")}
            more = found.get("extra_special_tokens")
            said |= more if isinstance(more, dict) else {}
        contents = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in said.items()
        }
        return {name: text for name, text in contents.items() if isinstance(text, str)}

    def around_texts(self) -> str | None:
        with _stumbling(self._path, "cannot encode a text"):
            whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        if whole == self.encode("a"):
            return None
        return (
            f"its tokenizer makes {self.decode(whole)!r} of the text 'a' in transformers; here "
            "nothing is added: what a text is to begin with must stand in it "
            "(--parse-special-tokens)"
        )

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name, of which the usual one is "default"; as transformers finds them.

        Raises:
            DataError: they are of no known form.
        """
        if (own := self._files.get("chat_template.jinja")) is not None:
            with _stumbling(self._path, "has a chat_template.jinja beside it that is no text"):
                return {"default": own.decode()}
        said = self._json(self.config_name).get("chat_template")
        if said is None:
            return {}
        if isinstance(said, str):
            return {"default": said}
        with _stumbling(self._path, f"has no chat template in its {self.config_name} as is known"):
            return {str(each["name"]): str(each["template"]) for each in said}

    def _json(self, name: str) -> dict[str, Any]:
        """The object in one of its files; empty without that file."""
        if name not in self._files:
            return {}
        beside = self._path.with_name(name)
        try:
            content = parse_json(self._files[name])
        except ValueError as error:
            raise DataError(f"{beside} is not a JSON object: {error}") from error
        if not isinstance(content, dict):
            raise DataError(f"{beside} is not a JSON object")
        return content

    def _token_of_config(self, path: Path, name: str) -> str | None:
        token = self._json(self.config_name).get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if not isinstance(content, str) and token is not None:
            raise DataError(
                f"{name}={token!r:.60} in {path.with_name(self.config_name)} must be a text, or an "
                "object whose content is one"
            )
        return content

    def encode(self, text: str) -> list[int]:
        with _stumbling(self._path, "cannot encode a text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What `encode` gives, and the characters `[begin, end)` of `text` that each id is of.

        Raises:
            DataError: the text holds characters that would be left out.
        """
        if self._losses is not None and (problem := self._losses.problem(text)):
            raise DataError(problem)
        with _stumbling(self._path, "cannot encode a text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def decode(self, ids: Sequence[int]) -> str:
        # Those above are left out by itself; those below 0 it would not take.
        return self._tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray, NDArray[np.int32]]:
        """As `Tokenizer.encode_batch`.

        Raises:
            DataError: a text holds characters that would be left out.
        """
        for text in texts if self._losses is not None else ():
            if self._losses is not None and (problem := self._losses.problem(text)):
                raise DataError(problem)
        with _stumbling(self._path, "cannot encode a text"):
            if self._fast is not None:
                ids, lengths = self._fast.encode_batch(texts)
            else:
                encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
                ids, lengths = joined([encoding.ids for encoding in encodings])
        return ids.astype(token_dtype(self.vocab_size)), lengths

    def select_encoder(self, choice: str, sample: Sequence[str] = ()) -> str:
        """As `Tokenizer.select_encoder`; the choice and its reason are logged.

        "auto" takes fastokens if it reads the file and gives what `tokenizers` gives for
        `hard_texts` and for `sample`. Loading it takes seconds for a large vocabulary.
        """
        if choice not in ENCODERS:
            return super().select_encoder(choice, sample)
        self._fast = None
        if choice == "tokenizers":
            return "tokenizers"
        try:
            fast = FastEncoder(self._files[self.file_name], self._tokenizer)
            added = self._tokenizer.get_added_tokens_decoder().values()
            texts = [*hard_texts([token.content for token in added]), *sample]
            with _stumbling(self._path, "cannot encode a text"):
                fast.check(texts)
        except FastokensError as error:
            if choice == "fastokens":
                raise DataError(
                    f"encoder=fastokens cannot be used with data.tokenizer_model={self._path}: "
                    f"{error}; allowed: auto, tokenizers"
                ) from error
            logger.warning(
                "%s: encoding with tokenizers, many times slower, not with fastokens: %s",
                self._path, error,
            )  # fmt: skip
            return "tokenizers"
        logger.info(
            "%s: encoding with fastokens, which agreed with tokenizers on %d texts",
            self._path, len(texts),
        )  # fmt: skip
        self._fast = fast
        return "fastokens"
