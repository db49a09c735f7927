"""The file beside an indexed pair, `<prefix>.meta.json`: checksums, counts, what made it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.small_files import read_json

_FORMAT = "megatron-hybrid tokens"
_VERSION = 1

Count = Annotated[int, Field(ge=0)]
TokenizerType = Literal["sentencepiece", "huggingface", "null"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileFacts:
    """Size and checksum (hex) of one file of the pair."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class TokenizerFacts:
    """What encoded the text; `fingerprint` is `Tokenizer.fingerprint`.

    `parse_special_tokens`: the text of a special token became its id.
    """

    type: TokenizerType
    fingerprint: str
    vocab_size: Count
    eod: Count
    parse_special_tokens: bool = False


@dataclass(frozen=True)
class InputFile:
    """A file that was read: its path as it was named, and its size on disk."""

    path: str
    bytes: Count


@dataclass(frozen=True)
class InputFacts:
    """What was read; `lines` = documents + empty + rejected (rows, where a file is parquet)."""

    files: tuple[InputFile, ...]
    lines: Count
    empty: Count
    rejected: Count


@dataclass(frozen=True)
class Facts:
    """All that is known of an indexed pair when it is published.

    Attributes:
        dtype: of the ids in the `.bin`.
        tokens: in all documents, with their end tokens.
        longest_document_tokens: with its end token.
        highest_token: the highest id in the `.bin`.
        append_eod: whether every document ends with the tokenizer's `eod`.
        shuffle_seed: the seed of the documents' order; None for the order of the input.
        mask: of the `.mask` beside the pair; None: its documents are no conversations.
        learnt_tokens: those that the mask names.
        chat_template: SHA-256 of the template that made text of the conversations.
    """

    bin: FileFacts
    idx: FileFacts
    dtype: Literal["uint16", "int32"]
    documents: Count
    tokens: Count
    longest_document_tokens: Count
    highest_token: Count
    tokenizer: TokenizerFacts
    append_eod: bool
    shuffle_seed: int | None
    input: InputFacts
    mask: FileFacts | None = None
    learnt_tokens: Count | None = None
    chat_template: Sha256 | None = None

    def to_json(self) -> str:
        """The content of the file, which `read_facts` reads."""
        content = {"format": _FORMAT, "version": _VERSION} | asdict(self)
        return json.dumps(content, indent=2) + "\n"


_ADAPTER = TypeAdapter(Facts)


def facts_path(prefix: Path | str) -> Path:
    """The facts of a prefix, which may itself hold dots."""
    return Path(f"{prefix}.meta.json")


def read_facts(prefix: Path | str) -> Facts | None:
    """The facts of a pair; None where there are none, as beside what Megatron-LM wrote.

    Raises:
        DataError: the file cannot be read, is damaged, or is of another version.
    """
    path = facts_path(prefix)
    if not path.exists():
        return None
    content = read_json(path, DataError)
    if content.get("format") != _FORMAT:
        raise DataError(f"{path} is not the facts of an indexed file (format must be {_FORMAT!r})")
    if content.get("version") != _VERSION:
        raise DataError(
            f"{path} has version {content.get('version')!r}; this program reads {_VERSION}"
        )
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise DataError(f"{path} is damaged: {_problems(error)}") from error


def _problems(error: ValidationError) -> str:
    def describe(problem: Any) -> str:
        where = ".".join(str(part) for part in problem["loc"])
        return f"{where}: {problem['msg']} (found {problem['input']!r})"

    return "; ".join(describe(problem) for problem in error.errors())
