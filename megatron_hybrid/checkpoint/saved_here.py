"""Which checkpoints of a folder the run that saves there has made itself.

`checkpoints.json` lists them, each with the number in its `stamp` file: a checkpoint that was
copied there, or restored, is none of them. Only those are ever removed or replaced.
"""

import json
import re
import uuid
from pathlib import Path

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.fileio import remove_tree, write_atomic
from megatron_hybrid.small_files import naming, read_json

LIST_FILE = "checkpoints.json"
STAMP_FILE = "stamp"
_MARK = re.compile(r"[0-9a-f]{32}\n")


def stamp(partial: Path) -> str:
    """Mark a checkpoint that is about to have its name; the mark."""
    mark = uuid.uuid4().hex
    write_atomic(partial / STAMP_FILE, mark + "\n")
    return mark


def saved_here(save: Path) -> dict[str, str]:
    """Marks of the checkpoints that are there and were saved by the run of this folder, by name.

    Raises:
        CheckpointError: the list is damaged, or a mark.
    """
    path = save / LIST_FILE
    if not path.exists():
        return {}
    listed = read_json(path, CheckpointError)
    with naming(path, CheckpointError):
        if not all(isinstance(mark, str) and Path(name).name == name
                   for name, mark in listed.items()):  # fmt: skip
            raise ValueError("it must hold names of checkpoints and their marks")
    return {name: mark for name, mark in listed.items() if _mark(save / name) == mark}


def remember(save: Path, name: str, mark: str) -> None:
    """List a checkpoint, which need not be there yet; those that are gone are dropped."""
    _write(save, saved_here(save) | {name: mark})


def move_aside(folder: Path) -> Path:
    """Take its name from a checkpoint that the run did not save; where it is now."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.other{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def remove(folder: Path) -> str | None:
    """Remove a checkpoint of the run's own: a reader sees it whole or not at all.

    Returns:
        What the user should know: it is out of the way, but could not be removed.
    """
    going = folder.with_name(f".{folder.name}.gone.part")
    problem = None
    try:
        if going.is_symlink() or going.exists():
            remove_tree(going)
        folder.rename(going)
        remove_tree(going)
    except OSError as error:
        problem = f"{folder}, an older checkpoint, could not be removed: {error}"
    _write(folder.parent, saved_here(folder.parent))  # a copy that comes back is somebody's
    return problem


def _write(save: Path, listed: dict[str, str]) -> None:
    write_atomic(save / LIST_FILE, json.dumps(listed, indent=1) + "\n")


def _mark(folder: Path) -> str | None:
    path = folder / STAMP_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if not _MARK.fullmatch(text):
        raise CheckpointError(
            f"{path} is damaged: it must hold 32 hexadecimal digits and a line end; without the "
            "file the checkpoint counts as somebody else's, and is kept"
        )
    return text.strip()
