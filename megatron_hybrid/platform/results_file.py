"""How a forked checkpoint writer tells its rank what it wrote: one message through a file."""

from __future__ import annotations

import pickle
import queue
import tempfile
from typing import Any


class ResultsFile:
    """A queue for one message from a forked child to its parent, of any size, without a server.

    The file has no name and belongs to the two processes alone: the child inherits it when it is
    forked, and it goes when both have closed it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object

    def put(self, message: Any) -> None:
        """Write the message; once only."""
        pickle.dump(message, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The message; queue.Empty if it was not written to its end, as when the writer died."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):  # nothing, or a part
            raise queue.Empty from None
