"""From the files named in the settings to published pairs, or to an error and no trace."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import InputFacts, InputFile
from megatron_hybrid.data.indexed import publish_all
from megatron_hybrid.data.part_file import writing
from megatron_hybrid.data.progress import OnProgress
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizing.chunks import cut
from megatron_hybrid.data.tokenizing.inputs import Input, check_unchanged
from megatron_hybrid.data.tokenizing.output import Output
from megatron_hybrid.data.tokenizing.quarantine import Quarantine
from megatron_hybrid.data.tokenizing.sample import sample_texts
from megatron_hybrid.data.tokenizing.settings import (
    TokenizeReport,
    TokenizeSettings,
    check,
    naming_flags,
)
from megatron_hybrid.data.tokenizing.workers import encode_in_order

# So many bad lines and not one good: the key is wrong, and hours more would not help.
_HOPELESS_LINES = 1000

logger = logging.getLogger(__name__)


def tokenize(settings: TokenizeSettings, on_progress: OnProgress | None = None) -> TokenizeReport:
    """Tokenise text files into one `.bin`, `.idx` and `.meta.json` for each key.

    Args:
        on_progress: called with what is going on ("tokenise", then "shuffle"), and how many bytes
            of the input, or of the output, are done and in all.

    Raises:
        DataError: what is wrong; what was published before is untouched.
    """
    tokenizer, inputs = check(settings)
    on_progress = on_progress or (lambda stage, done, total: None)
    if settings.chat:  # where tokens are in the text, only tokenizers tells
        settings = replace(settings, encoder="tokenizers")
    else:
        if (note := tokenizer.around_texts()) is not None:
            logger.warning("note: %s", note)
        sample = sample_texts(inputs, settings.keys)
        with naming_flags():
            chosen = tokenizer.select_encoder(settings.encoder, sample)
        settings = replace(settings, encoder=chosen)
    with ExitStack() as undo:
        quarantine, outputs = _open_outputs(settings, tokenizer, undo)
        lines = _encode(settings, tokenizer, inputs, outputs, quarantine, on_progress)
        check_unchanged(inputs)
        _judge(settings, quarantine, lines, outputs)
        files = tuple(InputFile(_as_text(item.path), item.bytes) for item in inputs)
        facts = {}
        for key, output in zip(settings.keys, outputs, strict=True):
            facts[key] = output.finish(
                lambda empty: InputFacts(files, lines, empty, quarantine.count),
                partial(on_progress, "shuffle"),
            )
        quarantine.publish()
        publish_all([output.writer for output in outputs])
    return TokenizeReport(lines, quarantine.count, sum(item.bytes for item in inputs), facts)


def _open_outputs(
    settings: TokenizeSettings, tokenizer: Tokenizer, undo: ExitStack
) -> tuple[Quarantine, list[Output]]:
    prefixes = settings.outputs.values()
    for path in (settings.rejected_path, *prefixes):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(settings.rejected_path)
    undo.callback(quarantine.discard)
    outputs = []
    for key in settings.keys:
        outputs.append(Output(settings, key, tokenizer))
        undo.callback(outputs[-1].discard)
    return quarantine, outputs


def _encode(
    settings: TokenizeSettings,
    tokenizer: Tokenizer,
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    quarantine: Quarantine,
    on_progress: OnProgress,
) -> int:
    """Encode all inputs into the outputs and the quarantine; gives the count of lines."""
    total_bytes = sum(item.bytes for item in inputs)
    lines = before = bytes_before = 0  # before: the lines before this file
    file = 0
    chunks = encode_in_order(cut(inputs, settings.keys), settings, tokenizer)
    with closing(chunks):  # ends the workers where the loop is left
        for chunk, encoded in chunks:
            while file < chunk.file:
                bytes_before += inputs[file].bytes
                file, before = file + 1, lines
            quarantine.add(_as_text(inputs[file].path), lines - before, encoded.rejected)
            for output, documents in zip(outputs, encoded.documents, strict=True):
                output.add(documents)
            lines += encoded.lines
            on_progress("tokenise", bytes_before + chunk.position, total_bytes)
            if quarantine.count == lines > _HOPELESS_LINES:
                break
    return lines


def _judge(
    settings: TokenizeSettings, quarantine: Quarantine, lines: int, outputs: Sequence[Output]
) -> None:
    """Refuse an outcome that should not be published."""
    if quarantine.count > settings.max_rejected_fraction * lines:
        quarantine.publish()
        stopped = " (stopped there)" if quarantine.count == lines > _HOPELESS_LINES else ""
        raise DataError(
            f"{quarantine.count} of {lines} lines are bad{stopped}, more than "
            f"--max-rejected-fraction {settings.max_rejected_fraction:g} allows; nothing was "
            f"published. The first is {quarantine.first}. All are in {settings.rejected_path}"
        )
    for key, output in zip(settings.keys, outputs, strict=True):
        if not output.documents:
            sought = "conversation" if settings.chat else "document"
            where = "" if settings.chat else f", for --json-key {key}"
            raise DataError(
                f"--input {' '.join(settings.inputs)}: no {sought} in {lines} lines{where}; "
                "nothing was published"
            )


def _as_text(path: Path) -> str:
    """A path as it was named; bytes that are no UTF-8 as escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")
