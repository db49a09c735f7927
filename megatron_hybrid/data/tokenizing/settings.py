"""What to tokenise and how, checked as a whole before any work."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from megatron_hybrid.bounds import MOST_PROCESSES
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import Facts, TokenizerType, facts_path
from megatron_hybrid.data.indexed import indexed_paths, mask_path
from megatron_hybrid.data.part_file import part_path
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from megatron_hybrid.data.tokenizing.inputs import Input, find_inputs
from megatron_hybrid.data.tokenizing.shuffle import shuffle_folder
from megatron_hybrid.fileio import why_not_writable

if TYPE_CHECKING:
    from megatron_hybrid.data.chat import ChatEncoder

MOST_IDS = 2**31 - 1  # token files hold int32

# Fields of a run's config, which the tokenizer's messages name, as the flags that set them here.
_FLAGS = {
    "data.tokenizer_type": "--tokenizer-type",
    "data.tokenizer_model": "--tokenizer-model",
    "model.vocab_size": "--vocab-size",
    "parse_special_tokens": "--parse-special-tokens",
    "encoder=": "--encoder=",
}


@contextmanager
def naming_flags() -> Iterator[None]:
    """Say flags, not fields of a config, where a DataError of the tokenizer names them."""
    try:
        yield
    except DataError as error:
        text = str(error)
        for name, flag in _FLAGS.items():
            text = text.replace(name, flag)
        raise DataError(text) from error


@dataclass(frozen=True)
class TokenizeSettings:
    """What to tokenise and how.

    Attributes:
        inputs: names and globs of JSONL (plain, gzip, zstd) and parquet files.
        outputs: for each JSON key, or column, the prefix of its indexed file.
        rejected_path: where the lines that were not taken are listed.
        vocab_size: only for `tokenizer_type="null"`.
        parse_special_tokens: let the text of a special token become its id.
        encoder: the library that encodes, one of `data.tokenizer.ENCODERS`.
        append_eod: end each document with the tokenizer's end token.
        shuffle_seed: of the documents' order; None keeps the order of the input.
        shuffle_memory_bytes: held while shuffling, shared by the outputs; more goes to disk.
        workers: processes that encode; the result does not depend on it.
        max_rejected_fraction: rejected lines per line above which nothing is published.
        chat: lines are conversations, of which a mask says what is to be learnt.
        chat_template: file of a template in place of the tokenizer's own.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, Path]
    rejected_path: Path
    tokenizer_type: TokenizerType
    tokenizer_model: Path | None
    vocab_size: int | None = None
    parse_special_tokens: bool = False
    encoder: str = "auto"
    append_eod: bool = True
    shuffle_seed: int | None = None
    shuffle_memory_bytes: int = 2 << 30
    workers: int = 1
    max_rejected_fraction: float = 0.001
    chat: bool = False
    chat_template: Path | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.outputs)

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            DataError: names the flag that is wrong.
        """
        with naming_flags():
            return build_tokenizer(
                self.tokenizer_type,
                self.tokenizer_model,
                vocab_size=self.vocab_size,
                # Templates write special tokens as text.
                parse_special_tokens=self.parse_special_tokens
                or (self.chat and self.tokenizer_type == "huggingface"),
            )

    def open_chat(self, tokenizer: Tokenizer) -> "ChatEncoder":
        """What encodes conversations.

        Raises:
            DataError: the tokenizer has no chat template that can be used.
        """
        from megatron_hybrid.data.chat import ChatEncoder  # and Jinja

        return ChatEncoder(tokenizer, self.chat_template, self.parse_special_tokens)


@dataclass(frozen=True)
class TokenizeReport:
    """What was published: for each key the facts of its file.

    Attributes:
        lines: documents + empty + rejected.
        input_bytes: of the files, on disk.
    """

    lines: int
    rejected: int
    input_bytes: int
    facts: Mapping[str, Facts]


def check(settings: TokenizeSettings) -> tuple[Tokenizer, list[Input]]:
    """Open what the settings name.

    Raises:
        DataError: lists every problem, before anything is written.
    """
    problems = []
    if not settings.keys or "" in settings.keys:
        problems.append("--json-key must name at least one key, none of them empty")
    if not 1 <= settings.workers <= MOST_PROCESSES:
        problems.append(f"--workers {settings.workers} must be from 1 to {MOST_PROCESSES}")
    if settings.shuffle_seed is not None and settings.shuffle_seed < 0:
        problems.append(f"--shuffle-seed {settings.shuffle_seed} must be at least 0")
    memory = psutil.virtual_memory().total
    if not 0 < settings.shuffle_memory_bytes <= memory:
        gib = settings.shuffle_memory_bytes / 2**30
        problems.append(
            f"--shuffle-memory-gib {gib:g} must be above 0 and at most this machine's "
            f"{memory / 2**30:.1f}"
        )
    if settings.vocab_size is not None and settings.vocab_size > MOST_IDS:
        problems.append(
            f"--vocab-size {settings.vocab_size} must be at most {MOST_IDS}, as an id has 32 bits"
        )
    if not 0 <= settings.max_rejected_fraction < 1:
        fraction = settings.max_rejected_fraction
        problems.append(f"--max-rejected-fraction {fraction:g} must be in [0, 1)")
    if settings.vocab_size is not None and settings.tokenizer_type != "null":
        problems.append(
            f"--vocab-size {settings.vocab_size} is only for --tokenizer-type null: a "
            f"{settings.tokenizer_type} tokenizer has a size of its own"
        )
    if settings.tokenizer_model is not None and settings.tokenizer_type == "null":
        problems.append(
            f"--tokenizer-model {settings.tokenizer_model} is of no use to --tokenizer-type null, "
            "which reads ids"
        )
    inputs, input_problems = find_inputs(settings.inputs, () if settings.chat else settings.keys)
    problems += input_problems + _output_problems(settings, inputs)
    if settings.chat:
        problems += _chat_problems(settings, inputs)
    tokenizer = None
    try:
        tokenizer = settings.open_tokenizer()
        if settings.chat:
            settings.open_chat(tokenizer)
    except DataError as error:
        problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems) if len(problems) == 1 else _listed(problems))
    assert tokenizer is not None
    return tokenizer, inputs


def _chat_problems(settings: TokenizeSettings, inputs: list[Input]) -> list[str]:
    problems = [
        f"--input {item.path} is parquet; --chat reads JSONL, plain, in gzip or zstd"
        for item in inputs
        if item.format == "parquet"
    ]
    if settings.append_eod:
        problems.append("--append-eod: with --chat, the chat template says what ends a turn")
    if settings.encoder == "fastokens":
        problems.append(
            "--encoder fastokens does not tell the places of tokens, which --chat goes by; "
            "allowed: auto, tokenizers"
        )
    return problems


def _listed(problems: list[str]) -> str:
    return "\n  - ".join([f"{len(problems)} problems:", *problems])


def _output_problems(settings: TokenizeSettings, inputs: list[Input]) -> list[str]:
    problems = []
    for prefix in settings.outputs.values():
        if prefix.name == "" or prefix.is_dir():
            problems.append(f"--output {prefix} is a folder; name its files' beginning too")
        elif reason := why_not_writable(prefix.parent):
            problems.append(f"--output {prefix}: {reason}")
        elif indexed_paths(prefix)[1].exists() and not facts_path(prefix).exists():
            problems.append(
                f"--output {prefix}: the files there have no {facts_path(prefix).name}: another "
                "program wrote them; give another prefix, or move them away"
            )
    return problems + [
        f"--input {path} would be overwritten"
        for path in sorted({item.path.resolve() for item in inputs})
        if _is_written(settings, path)
    ]


def _is_written(settings: TokenizeSettings, path: Path) -> bool:
    """Whether a run writes, or removes, a file of that name."""
    files, folders = [settings.rejected_path], []
    for prefix in settings.outputs.values():
        files += [*indexed_paths(prefix), mask_path(prefix), facts_path(prefix)]
        folders.append(shuffle_folder(prefix).resolve())
    written = {each.resolve() for file in files for each in (file, part_path(file))}
    return path in written or any(path.is_relative_to(folder) for folder in folders)
