"""The folders of checkpoints: Megatron-LM's layout, plus what makes a checkpoint describe itself.

    SAVE/latest_checkpointed_iteration.txt      "100"
    SAVE/iter_0000100/                          a torch_dist checkpoint of megatron-core
                     /run_config.yaml           the resolved config of the run
                     /tokenizer.model (.json)   the tokenizer's file
                     /hugging_face/             of the folder that its model came from (carried.py)
                     /data_plan.json            the plan of its data, and how far it was read
                     /data_files.json           in megatron-core's order: digests of its files
                     /integrity.json            SHA-256 of every file (megatron-core's format)
                     /stamp                     a number of its own
    SAVE/checkpoints.json                       those that the run of this folder saved, by stamp

A checkpoint is written to `.iter_0000100.part` and renamed when it is whole; only then does the
text file name it. What the run did not save itself is never removed or replaced.
"""

import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.saved_here import move_aside, remember, remove, saved_here, stamp
from megatron_hybrid.claim import claim_file, refuse_if_lost
from megatron_hybrid.config.tracker import TRACKER_FILE, latest_folder
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import (
    remove_tree,
    replace_folder,
    replaced_folder,
    restore_folder,
    sync_folder,
    write_atomic,
)

logger = logging.getLogger(__name__)

INDEX_FILE = ".metadata"  # of a checkpoint
_FOLDER = re.compile(r"iter_(\d{7,})")
# All that the pickled index of a torch_dist checkpoint is made of: the records (dataclasses and
# enums) of these modules, torch's dtypes, and a few names.
INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies",
)
INDEX_NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
    }
)


def iteration_folder(save: Path, iteration: int) -> Path:
    """`SAVE/iter_0000100`."""
    return save / f"iter_{iteration:07d}"


def latest_checkpoint(save: Path) -> Path | None:
    """The folder of the newest whole checkpoint under `save`, None where there is none.

    Without the file that names it, as after a kill, it is the newest one that is there, if all
    were saved by the run of this folder.

    Raises:
        UserError: the file that names it holds something else, or the checkpoint is missing; or
            there are checkpoints of which nothing says what they are.
    """
    try:
        folder = latest_folder(save)
    except FileNotFoundError:
        return _newest(save)
    except (OSError, ValueError) as error:
        raise UserError(f"{save / TRACKER_FILE} cannot be used: {error}") from error
    if not folder.is_dir():
        present = sorted(path.name for path in save.glob("iter_*"))
        text = (
            f"{save / TRACKER_FILE} names {folder.name}, but {folder} does not exist; "
            f"there: {', '.join(present) or 'no checkpoint'}"
        )
        if (old := replaced_folder(folder)).is_dir():
            # Whether a writer on another machine is just replacing it cannot be seen from here.
            text += (
                f"; {old.name} is the older one, left by a kill while it was replaced: renamed to "
                f"{folder.name}, it is gone on from"
            )
        raise UserError(text)
    return folder


def find_checkpoint(path: Path) -> Path:
    """The folder of one checkpoint: `path` itself, or the newest of a run or of its checkpoints.

    Raises:
        UserError: there is none, the file that should name it is broken, or nothing says which.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a checkpoint, its folder, or its run's")
    if (path / INDEX_FILE).is_file():
        return path
    # A run's own are in checkpoints/; what it started from may lie beside them.
    for folder in (path / "checkpoints", path):
        if (folder / TRACKER_FILE).is_file() or checkpoints_in(folder):
            found = latest_checkpoint(folder)
            assert found is not None
            return found
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {INDEX_FILE} nor {TRACKER_FILE}, "
        "nor a folder checkpoints/ with one"
    )


def partial_folder(save: Path, iteration: int) -> Path:
    """`SAVE/.iter_0000100.part`, where a checkpoint is written before it is whole."""
    return save / f".{iteration_folder(save, iteration).name}.part"


def checkpoints_in(save: Path) -> dict[int, Path]:
    """All folders that are named as checkpoints, by iteration, the oldest first."""
    if not save.is_dir():
        return {}
    matches = [(_FOLDER.fullmatch(path.name), path) for path in save.iterdir()]
    return dict(sorted((int(match.group(1)), path) for match, path in matches if match))


def _newest(save: Path) -> Path | None:
    present = checkpoints_in(save)
    if not present:
        return None
    ours = saved_here(save)
    others = [path.name for path in present.values() if path.name not in ours]
    if others:
        raise UserError(
            f"{save} holds {', '.join(others[:3])}, and no {TRACKER_FILE} that says which is the "
            "latest: write its number there to go on from it, or give the run another run_dir"
        )
    return present[max(present)]


def start_partial(save: Path, iteration: int) -> None:
    """Make an empty `partial_folder`; what killed runs left of theirs is removed.

    Raises:
        UserError: another start has taken this folder over (see `megatron_hybrid.claim`).
    """
    refuse_if_lost(claim_file(save))
    for old in save.glob(".iter_*.old.part"):
        restore_folder(save / old.name.removeprefix(".").removesuffix(".old.part"))
    partial = partial_folder(save, iteration)
    for stale in save.glob(".iter_*.part"):
        try:
            remove_tree(stale)
        except OSError as error:
            if stale == partial:
                raise
            logger.warning("%s, of a killed run, could not be removed: %s", stale, error)
    partial.mkdir(parents=True)


def discard_partial(save: Path, iteration: int) -> None:
    """Remove what was written of a checkpoint that cannot be whole."""
    try:
        refuse_if_lost(claim_file(save))
    except UserError:
        return  # it is another start's
    shutil.rmtree(partial_folder(save, iteration), ignore_errors=True)


def publish(save: Path, iteration: int, *, keep_last: int | None = None) -> list[str]:
    """Give a run's whole `partial_folder` its name, point the tracker at it, remove the oldest.

    Of checkpoints that the run of this folder saved itself, that of the same iteration (the run
    was rewound) is replaced, and those beyond the last are removed. Another of the same name is
    moved aside.

    Args:
        keep_last: how many of its own checkpoints stay; None for all.

    Returns:
        What the user should know.

    Raises:
        UserError: another start has taken this folder over.
    """
    refuse_if_lost(claim_file(save))
    partial, folder, notes = partial_folder(save, iteration), iteration_folder(save, iteration), []
    if folder.exists() and folder.name not in saved_here(save):
        notes.append(f"{folder} was not saved by this run: it is {move_aside(folder)} now")
    remember(save, folder.name, stamp(partial))
    put_in_place(save, iteration)
    if keep_last is not None:
        ours = saved_here(save)
        before = [path for number, path in checkpoints_in(save).items() if number <= iteration]
        for old in [path for path in before if path.name in ours][:-keep_last]:
            if problem := remove(old):
                notes.append(problem)
    return notes


def put_in_place(save: Path, iteration: int) -> None:
    """Give a whole `partial_folder` its name, in place of whatever has it, and name it the latest.

    One rename decides (see `replace_folder`).
    """
    partial = partial_folder(save, iteration)
    for path in partial.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sync_folder(partial)
    replace_folder(partial, iteration_folder(save, iteration))
    write_atomic(save / TRACKER_FILE, f"{iteration}\n")


def refuse_unsafe_index(folder: Path) -> None:
    """Refuse a checkpoint whose pickled index would run code when it is opened.

    torch.distributed.checkpoint reads `.metadata` with plain pickle; here it is read first by a
    reader that makes nothing but the records of such an index.

    Raises:
        UserError: the index names anything else, is damaged, or is missing.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _IndexReader(file, path).load()
    except FileNotFoundError:
        raise UserError(f"{folder} is not a whole checkpoint: it has no .metadata") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}") from error


@contextmanager
def no_code_from_pickles() -> Iterator[None]:
    """Objects in a checkpoint are read as plain data, whatever the reader asks of torch.load.

    torch.distributed.checkpoint asks for whole pickles, which can run code.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _IndexReader(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        # Judged before it is imported: an import runs code as well. A dotted name could reach
        # through a module into what that module imports.
        if (module, name) in INDEX_NAMES:
            return super().find_class(module, name)
        if module.startswith(INDEX_MODULES) and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        elif module == "torch":
            import torch  # here alone: folders are looked at before torch is needed

            if isinstance(found := getattr(torch, name, None), torch.dtype):
                return found
        raise UserError(f"{self._path} is refused: opening it would call {module}.{name}")
