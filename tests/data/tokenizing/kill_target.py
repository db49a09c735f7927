"""What a process that will be killed runs; imports nothing that a test needs."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_hybrid.data.tokenizing import TokenizeSettings, chunks, tokenize


def run(settings: TokenizeSettings, chunk_bytes: int, calls: int | None, counted: Path) -> None:
    """Tokenise in small chunks, up to a kill -9 at the begin or end of one of the calls, Python's
    functions and C's, that this takes.

    Args:
        calls: how many begins and ends come before the kill; None: none is killed, and their
            number is written to `counted`.
    """
    chunks.CHUNK_BYTES = chunk_bytes
    seen = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)
    tokenize(settings)
    sys.setprofile(None)
    if calls is None:
        counted.write_text(str(seen))
