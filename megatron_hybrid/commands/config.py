"""`megatron-hybrid config`: what a config may hold."""

from typing import Annotated

import typer


def config(
    reference: Annotated[
        bool,
        typer.Option("--reference", help="every field, its default and its flags, as Markdown"),
    ] = False,
) -> None:
    """What a config may hold: `config --reference > reference.md`."""
    if not reference:
        raise typer.BadParameter("say what to print", param_hint="--reference")
    from megatron_hybrid.reference import reference as text

    print(text(), end="")
