"""Weights & Biases: a run of a project, on its servers or, without a network, in files."""

import secrets
import string
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.training.trackers.base import Target
from megatron_hybrid.training.trackers.rows import Row

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<4sHB")  # ":W&B", a number, the format's version
_PART = struct.Struct("<IHB")
_ALPHABET = string.ascii_lowercase + string.digits


class WandB:
    """Options: `project`; `entity`; `exp_name`; `save_dir`, None: the run's folder.

    WANDB_MODE=offline writes files only; `wandb sync` sends them. Each start of the run then has a
    folder of its own, all with the run's id.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._folder = Path(target.options["save_dir"] or target.run_dir)
        self.last_step = -1

    def open(self, known: str | None, remember: Callable[[str], None]) -> None:
        import wandb

        if known is None:
            known = "".join(secrets.choice(_ALPHABET) for _ in range(8))
            remember(known)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.last_step = _last_step(self._folder, known)
        options = self._target.options
        self._run = wandb.init(
            project=options["project"],
            entity=options["entity"],
            name=self._target.name,
            dir=str(self._folder),
            id=known,
            resume="allow",
            config=dict(self._target.config),
            allow_val_change=True,  # by a start that goes on otherwise
            # The process that sends has no console of the run's, and measures no machine.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self.last_step = max(self.last_step, self._run.starting_step - 1)

    def send(self, row: Row) -> None:
        if row.step > self.last_step:
            self._run.log(row.values, step=row.step, commit=True)
            self.last_step = row.step

    def close(self, reason: str | None) -> None:
        self._run.finish(exit_code=0 if reason else 1)


def _last_step(folder: Path, run: str) -> int:
    """The last step in the files of earlier starts; -1: there is none."""
    files = folder.glob(f"wandb/*run-*-{run}/run-{run}.wandb")
    return max((step for file in files for step in _steps(file)), default=-1)


def _steps(file: Path) -> Iterator[int]:
    """The steps of a run's file."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # mypy knows none of them
    for data in _log_records(file.read_bytes()):
        record = messages.Record.FromString(data)
        for item in record.history.item:
            if "_step" in (item.key, *item.nested_key):
                yield int(item.value_json)


def _log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B's; what a kill has left at its end is passed over.

    The format is LevelDB's log (its doc/log_format.md) behind a header of W&B's own: blocks of
    32 KiB, in which each part of a record has a checksum, its length, and whether it is all of the
    record (1), its beginning (2), middle (3) or end (4). W&B has no reader of it for Python.
    """
    place, parts = _HEADER.size, b""
    while place + _PART.size <= len(data):
        if _BLOCK - place % _BLOCK < _PART.size:  # the rest of a block, too short for a part
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = _PART.unpack_from(data, place)
        part = data[place + _PART.size : place + _PART.size + length]
        if len(part) < length or kind == 0:
            return
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            yield parts
        place += _PART.size + length
