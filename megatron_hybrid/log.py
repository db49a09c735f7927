"""The log: one logger a module, to stderr, as text for people or as JSON for whoever collects it.

Rank 0 shows what is asked for, other ranks from warnings on; with "debug" all show everything. The
settings go on to ranks in the environment.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

from launchers.errors import POSITION

LEVEL, JSON = "MEGATRON_HYBRID_LOG_LEVEL", "MEGATRON_HYBRID_LOG_JSON"
OURS = "megatron_hybrid"


class Level(StrEnum):
    """The least that is shown."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def show_log(level: Level, *, as_json: bool) -> None:
    """Show this process's log on stderr, and let ranks that it starts do the same.

    The log of others, the engine's and Python's warnings among them, is shown from warnings on in
    JSON, and left as it is in text.
    """
    os.environ[LEVEL], os.environ[JSON] = level.value, str(int(as_json))
    rank = int(os.environ.get("RANK", "0"))
    least = logging.getLevelNamesMapping()[level.upper()]
    if rank and level is not Level.DEBUG:
        least = max(least, logging.WARNING)
    handler = _Stderr()
    handler.setFormatter(_Json(rank) if as_json else _Text(rank))
    ours = logging.getLogger(OURS)
    ours.setLevel(least)
    root = logging.getLogger()
    for each in (root, ours):
        for old in [handler for handler in each.handlers if isinstance(handler, _Stderr)]:
            each.removeHandler(old)
    (root if as_json else ours).addHandler(handler)
    logging.captureWarnings(as_json)


@contextmanager
def unsaid() -> Iterator[None]:
    """Within it nothing below an error is shown: rank 0, which does the same, says it."""
    ours = logging.getLogger(OURS)
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


class _Stderr(logging.StreamHandler[TextIO]):
    """To stderr as it is at that moment: a run outlives the one that it was started with."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class has one of its own, of the beginning."""


class _Text(logging.Formatter):
    """The message as it is; of another rank than 0, with its number."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank}: %(message)s" if rank else "%(message)s")


class _Json(logging.Formatter):
    """An object a line: time (UTC), level, logger, rank, step (null before the first), message."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._rank,
            "step": POSITION.iteration,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
