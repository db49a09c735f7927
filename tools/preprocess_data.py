#!/usr/bin/env python3
"""Tokenise JSONL text into `.bin`/`.idx`, with the flags and file names of Megatron-LM's script.

    python tools/preprocess_data.py --input web.jsonl --output-prefix data/web \\
        --tokenizer-type sentencepiece --tokenizer-model tokenizer.model --append-eod --workers 8

writes data/web_text_document.bin and .idx, ready for data.data_path.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from megatron_hybrid.data.tokenize import TokenizeSettings, tokenize_jsonl
from megatron_hybrid.data.tokenizer import TOKENIZER_TYPES
from megatron_hybrid.errors import UserError

_PLAIN_REPORT_EVERY_S = 10.0


def main() -> int:
    settings = _parse()
    console = Console(stderr=True)
    start = time.monotonic()
    try:
        with Progress(
            TextColumn(settings.input.name),
            BarColumn(),
            TaskProgressColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            bar = progress.add_task("", total=None)

            def draw(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            plain = _plain_progress(console)
            report = tokenize_jsonl(settings, draw if console.is_terminal else plain)
    except UserError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted: nothing was published")
        return 130
    seconds = time.monotonic() - start
    megabytes = settings.input.stat().st_size / 1e6
    for key, tokens in report.tokens.items():
        print(f"{settings.indexed_prefix(key)}.bin: {report.documents} documents, {tokens} tokens")
    print(
        f"{report.lines} lines, {report.empty} empty, {report.rejected} rejected; "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    if report.rejected:
        print(f"rejected lines: {settings.rejected_path}")
    return 0


def _parse() -> TokenizeSettings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", type=Path, required=True, help="JSONL file, one document a line")
    add("--output-prefix", type=Path, required=True, help="outputs are <prefix>_<key>_document.*")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    add("--tokenizer-model", type=Path, help="a sentencepiece .model or a tokenizer.json")
    add("--vocab-size", type=int, help="only for --tokenizer-type null")
    add("--json-keys", nargs="+", default=["text"], help="one output for each (default: text)")
    add("--append-eod", action="store_true", help="end each document with the end token")
    add("--workers", type=int, default=1, help="processes that encode (default: 1)")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.0,
        help="share of bad lines to tolerate; above it nothing is written (default: 0)",
    )
    arguments = vars(parser.parse_args())
    return TokenizeSettings(**(arguments | {"json_keys": tuple(arguments["json_keys"])}))


def _plain_progress(console: Console) -> Callable[[int, int], None]:
    """Lines instead of a bar, for logs."""
    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _PLAIN_REPORT_EVERY_S:
            return
        last = now
        rate = done / (now - start)
        console.print(
            f"{done / total:4.0%} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
            f"{(total - done) / rate:.0f} s left"
        )

    return report


if __name__ == "__main__":
    sys.exit(main())
