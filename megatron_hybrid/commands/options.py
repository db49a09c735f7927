"""Options that several commands have."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_hybrid.data.tokenizer import Tokenizer

ParseSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--parse-special-tokens", help="let the text of a special token, as </s>, become its id"
    ),
]


def note_around_texts(tokenizer: "Tokenizer") -> None:
    """Say on stderr what transformers puts around a text, and no command here, which encodes it."""
    if (note := tokenizer.around_texts()) is not None:
        print(f"note: {note}", file=sys.stderr)
