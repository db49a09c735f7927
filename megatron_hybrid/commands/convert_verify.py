"""`megatron-hybrid convert verify`: an export against the checkpoint that it was made from."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_hybrid.bounds import MOST_NEW_TOKENS
from megatron_hybrid.commands.app import only_with
from megatron_hybrid.commands.options import ModelOption, ParseSpecialTokens


@only_with("prompt", "parse_special_tokens")
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(help="a checkpoint, a folder of them, or a run: its newest")
    ],
    out: Annotated[Path, typer.Argument(help="what `convert to-hf` made of it")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="text to continue; may be repeated; by default built-in ones"),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_NEW_TOKENS, help="tokens to add to each prompt")
    ] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="largest difference, in standard deviations; default 1e-5"),
    ] = None,
    model: ModelOption = None,
    parse_special_tokens: ParseSpecialTokens = False,
    json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Compare layers, logits and greedy text with transformers', in fp32; 1 if they differ."""
    from checkpoints_converter.errors import ConversionError
    from megatron_hybrid.checkpoint.files import find_checkpoint
    from megatron_hybrid.small_files import read_json

    find_checkpoint(checkpoint)  # what is not there is said before torch is loaded
    read_json(out / "config.json", ConversionError)
    # Both sides compute on the CPU, whatever there is; read when torch looks for devices.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from checkpoints_converter.verify import TOLERANCE
    from checkpoints_converter.verify import verify as compare
    from checkpoints_converter.verify_report import print_report

    report = compare(
        checkpoint,
        out,
        prompt or (),
        model=model,
        parse_special_tokens=parse_special_tokens,
        max_new_tokens=max_new_tokens,
        tolerance=TOLERANCE if tolerance is None else tolerance,
    )
    if json:
        print(report.to_json())
    else:
        print_report(report, Console())
    if not report.passed:
        raise typer.Exit(1)
