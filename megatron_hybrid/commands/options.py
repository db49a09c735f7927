"""Options that several commands have."""

from typing import Annotated

import typer

ParseSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--parse-special-tokens", help="let the text of a special token, as </s>, become its id"
    ),
]
