"""`metrics.jsonl` as it grows, as rows of numbers: what is sent to a tracker."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron_hybrid.small_files import naming
from megatron_hybrid.training.metrics import scalars


@dataclass(frozen=True)
class Row:
    """Attributes: `step`; `values`, all numbers of the records of this step, by their tags."""

    step: int
    values: dict[str, float]


class Rows:
    """Reads on from where it stood, in the file that it found: a later start of the run may put
    another in its place, which is for that start's own reader.

    A row is given out once it is whole: when a record of a later step is there, or nothing more
    will come. An evaluation belongs to the row of the step before it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._offset = 0
        self._row = Row(0, {})

    def read(self, *, last: bool) -> Iterator[Row]:
        """The rows that have become whole; `last`: and the one that has not."""
        for record in self._records():
            with naming(self._path):
                values = scalars(record)
            if not values:
                continue
            if record["iteration"] != self._row.step:
                yield from self._whole()
                self._row = Row(record["iteration"], {})
            self._row.values.update(values)
        if last:
            yield from self._whole()
            self._row = Row(self._row.step, {})

    def _whole(self) -> Iterator[Row]:
        if self._row.values:
            yield self._row

    def _records(self) -> Iterator[dict[str, Any]]:
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return
        self._file.seek(self._offset)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with naming(self._path):
                record = orjson.loads(line)
            yield record
