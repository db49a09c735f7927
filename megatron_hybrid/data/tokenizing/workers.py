"""Chunks to ids in several processes, given back in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizing.chunks import CHUNK_BYTES, ByteRange, Chunk, Lines, Rows
from megatron_hybrid.data.tokenizing.encoder import (
    ConversationEncoder,
    Encoded,
    Encoder,
    build_encoder,
)
from megatron_hybrid.data.tokenizing.settings import TokenizeSettings

# Text that is being encoded or waits: enough to keep workers busy, and a bound on memory.
_BYTES_AHEAD_PER_WORKER = 4 * CHUNK_BYTES


def encode_in_order(
    chunks: Iterable[Chunk], settings: TokenizeSettings, tokenizer: Tokenizer
) -> Generator[tuple[Chunk, Encoded]]:
    """Yield each chunk and its outcome, in the order of `chunks`, whatever `settings.workers` is.

    Raises:
        DataError: a chunk cannot be encoded at all, or a worker process died.
    """
    if settings.workers == 1:
        encoder = build_encoder(settings, tokenizer)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk.payload)
        return
    # Spawned, not forked: a fresh process has no threads or locks of its parent's to trip over.
    pool = ProcessPoolExecutor(
        settings.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(settings, tokenizer.fingerprint),
    )
    try:
        yield from _submit_ahead(pool, chunks, _BYTES_AHEAD_PER_WORKER * settings.workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory?); nothing was published. Try fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit_ahead(
    pool: ProcessPoolExecutor, chunks: Iterable[Chunk], bytes_ahead: int
) -> Iterator[tuple[Chunk, Encoded]]:
    pending: deque[tuple[Chunk, Future[Encoded]]] = deque()
    waiting = 0
    for chunk in chunks:
        while pending and waiting + chunk.bytes > bytes_ahead:
            oldest, future = pending.popleft()
            yield oldest, future.result()
            waiting -= oldest.bytes
        pending.append((chunk, pool.submit(_encode_in_worker, chunk.payload)))
        waiting += chunk.bytes
    for chunk, future in pending:
        yield chunk, future.result()


_settings: TokenizeSettings
_fingerprint: str
_encoder: Encoder | ConversationEncoder | None = None


def _start_worker(settings: TokenizeSettings, fingerprint: str) -> None:
    global _settings, _fingerprint
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A parent killed with -9 cannot tell its workers to stop, and they would wait for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _settings, _fingerprint = settings, fingerprint


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(payload: ByteRange | Lines | Rows) -> Encoded:
    # Opened here, not as the process starts: only from here does an error reach the parent.
    global _encoder
    if _encoder is None:
        tokenizer = _settings.open_tokenizer()
        if tokenizer.fingerprint != _fingerprint:
            raise DataError(
                f"--tokenizer-model {_settings.tokenizer_model} changed meanwhile; "
                "nothing was published"
            )
        tokenizer.select_encoder(_settings.encoder)
        _encoder = build_encoder(_settings, tokenizer)
    return _encoder.encode(payload)
