"""The token files that a source's path stands for, and an older pair that a kill has left aside.

A pair is replaced in steps of which one rename, that of the new `.idx`, decides. Before it the old
files are beside their places, as `.old.part`; whoever looks for the pair then puts them back.
"""

import fcntl
import glob
from contextlib import suppress
from pathlib import Path

from megatron_hybrid.fileio import matches

OLD = ".old.part"
_REST = (".meta.json", ".mask", ".bin")  # of a pair, beside the .idx


def prefixes(path: str) -> list[str]:
    """The prefixes that a prefix or a glob of prefixes stands for, sorted; none: no match.

    A path that has an index of its own is a prefix, whatever `*`, `?` and `[` it holds.
    """
    restore(path)
    if not glob.has_magic(path) or Path(f"{path}.idx").exists():
        return [path]
    for match in matches(f"{path}.idx{OLD}"):
        restore(match.removesuffix(f".idx{OLD}"))
    return [match.removesuffix(".idx") for match in matches(f"{path}.idx")]


def restore(prefix: str) -> None:
    """Put an older pair back, if a kill has left it aside; not while its writer lives."""
    if Path(f"{prefix}.idx").exists() or not Path(f"{prefix}.idx{OLD}").exists():
        return
    # Where it cannot be written, the pair is missing, as whoever looks for it will say.
    with suppress(OSError), Path(f"{prefix}.idx.part").open("ab") as lock:
        # Taken, or a file system without locks, where a writer may live: the next writer does it.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        put_back(prefix)
        Path(lock.name).unlink()


def set_aside(prefix: str) -> None:
    """Move an older pair away from its place: first what makes it load."""
    for end in (".idx", *_REST):
        with suppress(FileNotFoundError):
            Path(f"{prefix}{end}").rename(f"{prefix}{end}{OLD}")


def put_back(prefix: str) -> None:
    """Undo `set_aside`, and what came into the places since; drop what is aside of a decided one.

    The caller holds the writer's lock.
    """
    aside = {end: Path(f"{prefix}{end}{OLD}") for end in (".idx", *_REST)}
    if aside[".idx"].exists() and not Path(f"{prefix}.idx").exists():
        if aside[".bin"].exists():  # all were aside: facts and masks there are the new pair's
            for end in (".meta.json", ".mask"):
                Path(f"{prefix}{end}").unlink(missing_ok=True)
        for end in (*_REST, ".idx"):  # last what makes it load
            with suppress(FileNotFoundError):
                aside[end].rename(f"{prefix}{end}")
    for path in aside.values():
        path.unlink(missing_ok=True)
