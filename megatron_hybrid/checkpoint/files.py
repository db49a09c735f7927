"""The folders of checkpoints: Megatron-LM's layout, plus what makes a checkpoint describe itself.

    SAVE/latest_checkpointed_iteration.txt      "100"
    SAVE/iter_0000100/                          a torch_dist checkpoint of megatron-core
                     /run_config.yaml           the resolved config of the run
                     /tokenizer.model (.json)   the tokenizer's file
                     /hugging_face/             of the folder that its model came from (carried.py)
                     /data_plan.json            the plan of its data, and how far it was read
                     /integrity.json            SHA-256 of every file (megatron-core's format)

A checkpoint is written to `.iter_0000100.part` and renamed when it is whole; only then does the
text file name it.
"""

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

from megatron_hybrid.config.tracker import TRACKER_FILE, latest_folder
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import sync_folder, write_atomic

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

    Raises:
        UserError: the file that names it holds something else, or the checkpoint is missing.
    """
    try:
        folder = latest_folder(save)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{save / TRACKER_FILE} cannot be used: {error}") from error
    if not folder.is_dir():
        present = sorted(path.name for path in save.glob("iter_*"))
        raise UserError(
            f"{save / TRACKER_FILE} names {folder.name}, but {folder} does not exist; "
            f"there: {', '.join(present) or 'no checkpoint'}"
        )
    return folder


def partial_folder(save: Path, iteration: int) -> Path:
    """`SAVE/.iter_0000100.part`, where a checkpoint is written before it is whole."""
    return save / f".{iteration_folder(save, iteration).name}.part"


def start_partial(save: Path, iteration: int) -> None:
    """Make an empty `partial_folder`; what killed runs left of theirs is removed."""
    for stale in save.glob(".iter_*.part"):
        shutil.rmtree(stale)
    partial_folder(save, iteration).mkdir(parents=True)


def publish(partial: Path, save: Path, iteration: int, keep_last: int | None) -> None:
    """Give a whole checkpoint its name, point the tracker at it, remove the oldest beyond the last.

    Args:
        keep_last: how many checkpoints stay; None for all.
    """
    for path in partial.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    sync_folder(partial)
    folder = iteration_folder(save, iteration)
    if folder.exists():
        # The same iteration of an earlier run that was rewound; the new one takes its place.
        shutil.rmtree(folder)
    partial.rename(folder)
    sync_folder(save)
    write_atomic(save / TRACKER_FILE, f"{iteration}\n")
    if keep_last is None:
        return
    names = [match.group(1) for path in save.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    iterations = sorted(map(int, names))
    for old in [i for i in iterations if i <= iteration][:-keep_last]:
        shutil.rmtree(iteration_folder(save, old))


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
