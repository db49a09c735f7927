"""Prefixes as people name them: themselves, globs, or one of the files."""

import glob
from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.config.token_files import OLD, restore
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.fileio import matches

_SUFFIXES = (".bin", ".idx", ".meta.json")


def find_prefixes(names: Sequence[str]) -> list[Path]:
    """The prefixes that are named, each once, globs in the order of their paths.

    Args:
        names: prefixes, which may hold dots, globs of prefixes, or paths of a `.bin`, `.idx` or
            `.meta.json`, or globs of those.

    Raises:
        DataError: names everything that has neither a `.bin` nor an `.idx`.
    """
    found: dict[Path, None] = {}
    missing = []
    for name in names:
        prefixes = _prefixes(name)
        found |= dict.fromkeys(prefixes)
        if not prefixes:
            missing.append(name)
    if missing:
        raise DataError(
            f"no indexed files at {', '.join(missing)}: there must be a .bin and an .idx whose "
            "path begins so"
        )
    return list(found)


def _prefixes(name: str) -> list[Path]:
    """Prefixes with at least one file of a pair: where one is missing, that is worth a word."""
    as_prefix = _with_files(glob.escape(name)) or _with_files(name)
    suffix = next((end for end in _SUFFIXES if name.endswith(end)), None)
    if as_prefix or suffix is None:
        return as_prefix
    name = name.removesuffix(suffix)
    return _with_files(glob.escape(name)) or _with_files(name)


def _with_files(pattern: str) -> list[Path]:
    for path in matches(f"{pattern}.idx{OLD}"):
        restore(path.removesuffix(f".idx{OLD}"))
    return sorted(
        {
            Path(path.removesuffix(suffix))
            for suffix in (".bin", ".idx")
            for path in matches(f"{pattern}{suffix}")
        }
    )
