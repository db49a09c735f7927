"""Output that a run outlives: a pipe whose reader is gone, a closed terminal, a full disk.

Ctrl-C ends `tee` in `pretrain … | tee log` too, and a session that is lost takes its terminal
along: the line of a step must not be what keeps the run from saving.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast


class _Lasting:
    """A stream whose errors of the system nobody meets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """In the block, what cannot be written to stdout and stderr is left out: metrics have it.

    Python has None for a stream that was closed before it started.
    """
    streams = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout, sys.stderr = (cast(TextIO, _Lasting(each or nowhere)) for each in streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for stream in filter(None, streams):
                try:
                    stream.flush()
                except OSError:  # what is left would be tried again, and fail, as Python ends
                    os.dup2(nowhere.fileno(), stream.fileno())
