"""JSONL text to indexed files: several processes encode, one writes, in the order of the lines.

Every line is accounted for: it becomes a document, or is counted as empty, or is listed with its
number and the reason in `<prefix>_rejected.jsonl`. The output appears whole or not at all.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedFileWriter, token_dtype
from megatron_hybrid.data.tokenizer import Tokenizer, build_tokenizer
from megatron_hybrid.fileio import write_atomic

# Large enough that handing a chunk over costs nothing, small enough for a smooth progress bar.
_CHUNK_BYTES = 1 << 20
_CHUNKS_AHEAD_PER_WORKER = 3


@dataclass(frozen=True)
class TokenizeSettings:
    """What to tokenise and how; one field for each flag of `tools/preprocess_data.py`.

    Attributes:
        vocab_size: only for `tokenizer_type="null"`.
        max_bad_fraction: rejected lines per line above which nothing is published.
    """

    input: Path
    output_prefix: Path
    tokenizer_type: str
    tokenizer_model: Path | None
    vocab_size: int | None = None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    workers: int = 1
    max_bad_fraction: float = 0.0

    def indexed_prefix(self, key: str) -> Path:
        """Where the documents of a JSON key go, without `.bin` or `.idx`; Megatron-LM's names."""
        return Path(f"{self.output_prefix}_{key}_document")

    @property
    def rejected_path(self) -> Path:
        return Path(f"{self.output_prefix}_rejected.jsonl")


@dataclass
class TokenizeReport:
    """What became of the lines: `lines` = documents + empty + rejected."""

    lines: int = 0
    documents: int = 0
    empty: int = 0
    rejected: int = 0
    tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chunk:
    """The outcome of one chunk: for each key the ids, end to end, and lengths in tokens."""

    lines: int
    empty: int
    rejected: list[tuple[int, str]]
    tokens: dict[str, bytes]
    lengths: dict[str, NDArray[np.int32]]


def tokenize_jsonl(
    settings: TokenizeSettings, on_progress: Callable[[int, int], None] | None = None
) -> TokenizeReport:
    """Tokenise one JSONL file into `<prefix>_<key>_document.bin/.idx` for each key.

    Args:
        settings: the input, the output and the tokenizer.
        on_progress: called with (bytes done, bytes in all).

    Raises:
        DataError: nothing was published; the message says why.
    """
    tokenizer = _check(settings)
    total_bytes = settings.input.stat().st_size
    report = TokenizeReport()
    rejected: list[tuple[int, str]] = []
    settings.output_prefix.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        writers: dict[str, IndexedFileWriter] = {}
        for key in settings.json_keys:
            writers[key] = IndexedFileWriter(settings.indexed_prefix(key), tokenizer.vocab_size)
            undo.callback(writers[key].discard)
        for end, chunk in _encode_chunks(settings, tokenizer):
            rejected += [(report.lines + line, reason) for line, reason in chunk.rejected]
            report.lines += chunk.lines
            report.empty += chunk.empty
            for key, writer in writers.items():
                writer.add_documents(chunk.tokens[key], chunk.lengths[key])
            if on_progress is not None:
                on_progress(end, total_bytes)
        report.rejected = len(rejected)
        report.documents = report.lines - report.empty - report.rejected
        report.tokens = {key: writer.token_count for key, writer in writers.items()}
        _write_rejected(settings, rejected)
        _judge(settings, report, rejected)
        for writer in writers.values():
            writer.finish()
        undo.pop_all()
        for writer in writers.values():
            writer.publish()
    return report


def _check(settings: TokenizeSettings) -> Tokenizer:
    """Refuse settings that cannot work before any work; gives the tokenizer it opened."""
    if not settings.input.is_file():
        raise DataError(f"--input {settings.input} is not a file")
    if settings.workers < 1:
        raise DataError(f"--workers {settings.workers} must be at least 1")
    if not 0 <= settings.max_bad_fraction < 1:
        raise DataError(f"--max-bad-fraction {settings.max_bad_fraction} must be in [0, 1)")
    if len(set(settings.json_keys)) != len(settings.json_keys) or not settings.json_keys:
        raise DataError(f"--json-keys {' '.join(settings.json_keys)} must name each key once")
    return build_tokenizer(
        settings.tokenizer_type, settings.tokenizer_model, vocab_size=settings.vocab_size
    )


def _judge(
    settings: TokenizeSettings, report: TokenizeReport, rejected: Sequence[tuple[int, str]]
) -> None:
    if report.rejected > settings.max_bad_fraction * report.lines:
        line, reason = rejected[0]
        raise DataError(
            f"{settings.input}: {report.rejected} of {report.lines} lines are bad, more than "
            f"--max-bad-fraction {settings.max_bad_fraction:g} allows; nothing was published. "
            f"The first is line {line}: {reason}. All are in {settings.rejected_path}"
        )
    if report.documents == 0:
        raise DataError(f"{settings.input} holds no document; nothing was published")


def _write_rejected(settings: TokenizeSettings, rejected: Sequence[tuple[int, str]]) -> None:
    if not rejected:
        settings.rejected_path.unlink(missing_ok=True)
        return
    lines = (json.dumps({"line": line, "reason": reason}) for line, reason in rejected)
    write_atomic(settings.rejected_path, "\n".join(lines) + "\n")


def _encode_chunks(
    settings: TokenizeSettings, tokenizer: Tokenizer
) -> Iterator[tuple[int, _Chunk]]:
    """Yield (byte where the chunk ends, its outcome) in the order of the file."""
    if settings.workers == 1:
        encoder = _Encoder(settings, tokenizer)
        for begin, end in _chunk_bounds(settings.input):
            yield end, encoder.encode(begin, end)
        return
    # Spawned, not forked: a fresh process has no threads or locks of its parent's to trip over.
    pool = ProcessPoolExecutor(
        settings.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings,),
    )
    try:
        pending: deque[tuple[int, Future[_Chunk]]] = deque()
        for begin, end in _chunk_bounds(settings.input):
            pending.append((end, pool.submit(_encode_in_worker, begin, end)))
            if len(pending) > _CHUNKS_AHEAD_PER_WORKER * settings.workers:
                end, future = pending.popleft()
                yield end, future.result()
        for end, future in pending:
            yield end, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory?); nothing was published. Try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunk_bounds(path: Path) -> Iterator[tuple[int, int]]:
    """Cut a file into byte ranges of about `_CHUNK_BYTES` that end where a line ends."""
    begin = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while begin < size:
            # One byte back: a line that ends exactly at the cut must not drag in the next one.
            file.seek(min(begin + _CHUNK_BYTES, size) - 1)
            file.readline()
            yield begin, file.tell()
            begin = file.tell()


_worker_encoder: "_Encoder"


def _start_worker(settings: TokenizeSettings) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A parent killed with -9 cannot tell its workers to stop, and they would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = build_tokenizer(
        settings.tokenizer_type, settings.tokenizer_model, vocab_size=settings.vocab_size
    )
    _worker_encoder = _Encoder(settings, tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(begin: int, end: int) -> _Chunk:
    return _worker_encoder.encode(begin, end)


class _Encoder:
    """Turns byte ranges of the input into ids."""

    def __init__(self, settings: TokenizeSettings, tokenizer: Tokenizer) -> None:
        self._keys = settings.json_keys
        self._path = settings.input
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._end = [tokenizer.eod] if settings.append_eod else []

    def encode(self, begin: int, end: int) -> _Chunk:
        """Encode the lines of one byte range; rejected lines are numbered from 1 within it."""
        with self._path.open("rb") as file:
            file.seek(begin)
            lines = file.read(end - begin).removesuffix(b"\n").split(b"\n")
        ids: dict[str, list[int]] = {key: [] for key in self._keys}
        lengths: dict[str, list[int]] = {key: [] for key in self._keys}
        rejected: list[tuple[int, str]] = []
        empty = 0
        for number, line in enumerate(lines, start=1):
            try:
                documents = self._encode_line(line)
            except DataError as error:
                rejected.append((number, str(error)))
                continue
            if not all(documents):
                empty += 1
                continue
            for key, document in zip(self._keys, documents, strict=True):
                ids[key] += document
                ids[key] += self._end
                lengths[key].append(len(document) + len(self._end))
        return _Chunk(
            lines=len(lines),
            empty=empty,
            rejected=rejected,
            tokens={key: np.array(ids[key], dtype=self._dtype).tobytes() for key in self._keys},
            lengths={key: np.array(lengths[key], dtype=np.int32) for key in self._keys},
        )

    def _encode_line(self, line: bytes) -> list[list[int]]:
        """The ids of each key's text, all empty for a blank line; DataError says what is wrong."""
        if not line.strip():
            return [[] for _ in self._keys]
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(_why_not_json(line, error)) from error
        if not isinstance(record, dict):
            raise DataError(f"not a JSON object but {type(record).__name__}")
        documents = []
        for key in self._keys:
            if key not in record:
                raise DataError(f"key {key!r} is missing")
            if not isinstance(record[key], str):
                raise DataError(f"key {key!r} is {type(record[key]).__name__}, not a string")
            documents.append(self._tokenizer.encode(record[key]))
        return documents


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as bad:
        return f"invalid UTF-8: byte 0x{line[bad.start]:02x} at byte {bad.start} of the line"
    return f"malformed JSON: {error}"
