"""The lines that were not taken, each with its file, number and reason, as JSONL."""

import json
from pathlib import Path

from megatron_hybrid.data.part_file import PartFile, writing
from megatron_hybrid.data.tokenizing.records import Rejected
from megatron_hybrid.fileio import sync_folder


class Quarantine:
    """Writes rejected lines to a file, which appears when `publish` is called.

    Attributes:
        count: lines rejected so far.
        first: the first of them, in words.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError if another process is writing it, or it cannot be made."""
        self.count = 0
        self.first = ""
        self._path = path
        with writing(path):
            self._part = PartFile(path, locked=True)

    def add(self, file: str, before: int, rejected: list[Rejected]) -> None:
        """Write down the lines rejected in a chunk of `file`, which has `before` lines before it.

        Raises:
            DataError: the file cannot be written.
        """
        if not rejected:
            return
        if not self.count:
            self.first = f"line {before + rejected[0].line} of {file}: {rejected[0].reason}"
        self.count += len(rejected)
        entries = (
            {
                "file": file,
                "line": before + line.line,
                "reason": line.reason,
                "start": line.start,
            }
            for line in rejected
        )
        with writing(self._path):
            self._part.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())

    def publish(self) -> None:
        """Put the list in place of an older one; without a rejected line there is no list."""
        with writing(self._path):
            self._part.sync()
            if self.count:
                self._part.publish()
            else:
                self._path.unlink(missing_ok=True)
                self._part.discard()
            sync_folder(self._path.parent)

    def discard(self) -> None:
        """Leave no trace; does nothing after `publish`."""
        self._part.discard()
