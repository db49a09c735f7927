"""Options that several commands have."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hybrid.bounds import MOST_PROCESSES

if TYPE_CHECKING:
    from megatron_hybrid.data.tokenizer import Tokenizer

ParseSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--parse-special-tokens", help="let the text of a special token, as </s>, become its id"
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="preset or YAML file of the model, where the checkpoint names none; held against "
        "the config of one that has it"
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_PROCESSES, help="that read and write; by default up to 8"),
]


def read_option[Value](read: Callable[[str], Value], text: str, option: str) -> Value:
    """What an option's text says; what is wrong with it is a usage error, naming the option."""
    try:
        return read(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def note_around_texts(tokenizer: "Tokenizer") -> None:
    """Say on stderr what transformers puts around a text, and no command here, which encodes it."""
    if (note := tokenizer.around_texts()) is not None:
        print(f"note: {note}", file=sys.stderr)
