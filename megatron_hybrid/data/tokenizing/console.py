"""Tokenising at a terminal: a bar with MB/s and the time left, or lines in a log; a summary."""

import signal
import sys
import time
from types import FrameType

from megatron_hybrid.data.progress import show_progress
from megatron_hybrid.data.tokenizing.pipeline import tokenize
from megatron_hybrid.data.tokenizing.settings import TokenizeReport, TokenizeSettings
from megatron_hybrid.human import say


def tokenize_on_console(settings: TokenizeSettings) -> None:
    """Tokenise, show how far it is on stderr, and print what was made on stdout.

    SIGTERM, like Ctrl-C, removes what was written so far and publishes nothing.

    Raises:
        DataError: as `tokenize`.
    """
    signal.signal(signal.SIGTERM, _exit)
    start = time.monotonic()
    with show_progress("tokenise") as on_progress:
        report = tokenize(settings, on_progress)
    _print_report(settings, report, time.monotonic() - start)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _print_report(settings: TokenizeSettings, report: TokenizeReport, seconds: float) -> None:
    for key, facts in report.facts.items():
        kind, learnt = "documents", ""
        if facts.learnt_tokens is not None:
            share = facts.learnt_tokens / facts.tokens
            kind, learnt = "conversations", f" ({facts.learnt_tokens:,} learnt, {share:.0%})"
        say(
            f"{settings.outputs[key]}.bin: {facts.documents:,} {kind}, {facts.tokens:,} tokens"
            f"{learnt}, {facts.input.empty:,} empty lines left out"
        )
    megabytes = report.input_bytes / 1e6
    say(
        f"{report.lines:,} lines, {report.rejected:,} rejected; "
        f"{megabytes:.1f} MB in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)"
    )
    if report.rejected:
        say(f"rejected lines, with reasons: {settings.rejected_path}")
