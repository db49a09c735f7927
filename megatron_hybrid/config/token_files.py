"""The token files that a source's path stands for."""

import glob
from pathlib import Path


def prefixes(path: str) -> list[str]:
    """The prefixes that a prefix or a glob of prefixes stands for, sorted; none: no match.

    A path that has an index of its own is a prefix, whatever `*`, `?` and `[` it holds.
    """
    if not glob.has_magic(path) or Path(f"{path}.idx").exists():
        return [path]
    return sorted(match.removesuffix(".idx") for match in glob.glob(f"{path}.idx"))  # noqa: PTH207
