"""`megatron-hybrid generate`: text from a trained model."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_hybrid.bounds import MOST_NEW_TOKENS
from megatron_hybrid.commands.options import ParseSpecialTokens


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, its checkpoints', or one of them")
    ],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_NEW_TOKENS, help="tokens to add at most")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="only among the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="only among the likeliest that sum to p")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="only among those p times as probable as the likeliest")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="against tokens that were there before; 1: none")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 1234,
    stop: Annotated[
        list[str] | None, typer.Option(help="a text that ends the continuation; may be repeated")
    ] = None,
    parse_special_tokens: ParseSpecialTokens = False,
) -> None:
    """Continue a text with a trained model."""
    from megatron_hybrid.generation import Generator, Limits, SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=tuple(stop or ()),
    )  # fmt: skip
    with Generator(checkpoint, parse_special_tokens=parse_special_tokens) as generator:
        tokens = generator.encode(prompt)
        generator.limits = Limits(max_sequences=1, max_tokens=len(tokens) + max_new_tokens)
        pieces = generator.stream(tokens, params)
        # The prompt not before the model is loaded: an error would follow half a line.
        first = next(pieces, "")
        print(prompt + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
