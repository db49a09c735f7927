"""What a check found out, and the counting of what is wrong in a long column."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass
class Verdict:
    """What was found out about a pair; it is good if there are no problems.

    Attributes:
        problems: one sentence each, with the file and the place in it.
        unchecked: what could not be checked, and why.
    """

    prefix: Path
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0


class Wrong:
    """The wrong entries of a long column: how many, and a sentence about the first.

    Attributes:
        text: that sentence.
    """

    def __init__(self) -> None:
        self.text = ""
        self._count = 0

    def add(self, wrong: NDArray[np.bool_]) -> int | None:
        """Count the wrong entries of a block; the place in it of the first of all, if it is there.

        Who gets a place sets `text`.
        """
        count, before = int(np.count_nonzero(wrong)), self._count
        self._count += count
        return int(np.argmax(wrong)) if count and not before else None

    def report(self, verdict: Verdict) -> None:
        """Make them one problem, if there are any."""
        if self._count:
            more = f"; and {self._count - 1} more like it" if self._count > 1 else ""
            verdict.problems.append(self.text + more)
