"""A line of the report of a preflight."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of it, such as "disk space".
        found: what was seen, in short.
        problems: full sentences; none: all is well.
        notes: full sentences, of what holds but should be known.
        skipped: it was not looked at, and `found` says why.
    """

    name: str
    found: str
    problems: tuple[str, ...] = ()
    skipped: bool = False
    notes: tuple[str, ...] = ()
