"""A checkpoint made of another one, without a model: where it goes, and what it has beside tensors.

The counters, the tokenizer and the plan of the data go on; the optimizer's state does not.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.carried import carried_on, write_carried
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.integrity import verify_integrity, write_integrity
from megatron_hybrid.checkpoint.progress import Progress, saved_progress
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.same_samples import refuse_other_samples
from megatron_hybrid.checkpoint.saved_config import saved_config
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.claim import CLAIM_FILE, claim_file, claimed
from megatron_hybrid.config import CONFIG_FILE, RunConfig
from megatron_hybrid.data.saved_files import DATA_FILES_FILE
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE
from megatron_hybrid.data.tokenizer import (
    Tokenizer,
    build_tokenizer,
    holds_tokenizer,
    load_tokenizer,
)
from megatron_hybrid.fileio import file_errors, write_atomic

# Of a tensor in one piece of a file, as a rank reads whole pieces to take its share of them.
PART_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20  # of a matrix, read at a time


@dataclass(frozen=True)
class Written:
    """What was written."""

    folder: Path
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Beside:
    """What the new checkpoint has beside its tensors.

    Attributes:
        source: the checkpoint that it is made of.
        config: what it holds.
        progress: where the source stood; None: unknown.
    """

    source: Path
    config: RunConfig
    tokenizer: Tokenizer
    progress: Progress | None

    @classmethod
    def find(
        cls,
        reader: CheckpointReader,
        was: RunConfig,
        config: RunConfig,
        *,
        restart_schedule: bool,
        threads: int,
    ) -> "Beside":
        """Of a checkpoint, which is compared with its checksums.

        Args:
            was: the config of the source.
            restart_schedule: the learning rate starts its schedule anew there.

        Raises:
            UserError: a file is damaged, there is neither a tokenizer that fits nor counters where
                they are needed, or it has counted other samples than the config goes on with.
        """
        source = reader.folder
        tokenizer = derived_tokenizer(source, was, config)
        saved = saved_config(source)
        if config.checkpoint.verify_integrity:
            verify_integrity(source, saved, threads)
        config = config.with_vocab_size(tokenizer.vocab_size)
        progress = _progress(reader, config, restart_schedule)
        if saved is not None and progress is not None and progress.consumed_samples:
            has_plan = (source / DATA_PLAN_FILE).exists()
            refuse_other_samples(source, config, saved, has_plan=has_plan)
        return cls(source, config, tokenizer, progress)

    def common(self, iteration: int, made: str, origin: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the checkpoint that belongs to no rank: counters, as in the source.

        Args:
            made: `UPCYCLING` or `COMPRESSION`.
            origin: of what and how.
        """
        common = {
            "checkpoint_version": 3.0,
            "iteration": iteration,
            made: {"from": str(self.source), **origin},
        }
        return common if self.progress is None else common | {"progress": vars(self.progress)}

    def write(self, partial: Path, threads: int) -> None:
        """The files beside the tensors: config, tokenizer, plan of the data, checksums."""
        write_atomic(partial / CONFIG_FILE, self.config.to_yaml())
        self.tokenizer.save_copy(partial)
        write_carried(partial, carried_on(self.source, self.tokenizer))
        for name in (DATA_PLAN_FILE, DATA_FILES_FILE):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, partial / name)
        if self.config.checkpoint.verify_integrity:
            write_integrity(partial, threads)


@contextmanager
def new_checkpoint(save: Path, iteration: int, command: str) -> Iterator[Path]:
    """A folder to write a checkpoint into, which has its name when the block is left, or is gone.

    Args:
        save: the folder of checkpoints to be; it must not exist, or be empty.
        command: who claims it.

    Raises:
        UserError: something is at `save`, or somebody writes there.
    """
    refuse_to_replace(save)
    with file_errors(save), claimed([claim_file(save)], command), _one_thread_an_operation():
        refuse_to_replace(save)  # what another one has written meanwhile
        files.start_partial(save, iteration)
        try:
            yield files.partial_folder(save, iteration)
            files.put_in_place(save, iteration)
        except BaseException:
            files.discard_partial(save, iteration)
            raise


def refuse_to_replace(save: Path) -> None:
    """Refuse a place where something is.

    Raises:
        CheckpointError: naming it; what was left by one that was killed does not count.
    """
    if not save.exists():
        return
    if not save.is_dir():
        raise CheckpointError(f"--save {save} is not a folder")
    there = sorted(
        path.name
        for path in save.iterdir()
        if not path.name.endswith(".part") and path.name != CLAIM_FILE
    )
    if there:
        raise CheckpointError(
            f"--save {save} holds {', '.join(there[:3])}; give a folder that is empty or not there"
        )


def _progress(
    reader: CheckpointReader, config: RunConfig, restart_schedule: bool
) -> Progress | None:
    """Where the new run stands.

    Raises:
        CheckpointError: the schedule is to start anew, and nothing says after how many samples.
    """
    progress = saved_progress(reader.folder, reader.common, config)
    if progress is not None:
        progress.loss_average, progress.objective_state = None, {}  # of another model
        if restart_schedule:
            progress.schedule_start_samples = progress.consumed_samples
    elif restart_schedule:
        raise CheckpointError(
            f"{reader.folder} does not say how many samples were read in its "
            f"{reader.common.get('iteration', 0)} steps, after which the schedule of the learning "
            "rate would start anew; --no-restart-schedule lets it go on"
        )
    return progress


@contextmanager
def _one_thread_an_operation() -> Iterator[None]:
    """Our threads share the processors; torch's, of which each of ours would start some, only spin
    there.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class MadeTensor(Protocol):
    """A tensor of the new checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""


def nbytes(made: MadeTensor) -> int:
    """Size of a tensor in bytes."""
    return torch.Size(made.shape).numel() * made.dtype.itemsize


def parts[Made: MadeTensor](
    tensors: Iterable[tuple[str, Made]], most: int = PART_BYTES
) -> Iterator[tuple[str, Made, int, int]]:
    """Tensors in parts along dim 0: name, tensor, first index, index after the last."""
    for name, made in tensors:
        length = made.shape[0]
        step = max(1, most * length // max(1, nbytes(made)))
        for start in range(0, length, step):
            yield name, made, start, min(start + step, length)


Advance = Callable[[int, int], None]
# File, name, first index, index after the last along dim 0, and its elements in any pieces.
WritePart = Callable[[int, str, int, int, Iterable[Tensor]], None]


@contextmanager
def written_tensors(
    folder: Path,
    tensors: Mapping[str, MadeTensor],
    extra_states: Iterable[str],
    common: Mapping[str, Any],
    threads: int,
    advance: Advance,
) -> Iterator[WritePart]:
    """What writes parts of a checkpoint's tensors; where the block ends, the index is written.

    Args:
        folder: exists, and is empty.
        tensors: all of them, by name.
        extra_states: keys of modules' states, which are empty.
        common: the part that belongs to no rank.
        threads: that write, each into a file of its own.
        advance: told bytes written since the last call, and bytes in all.
    """
    total = sum(nbytes(made) for made in tensors.values())
    advance(0, total)
    writer = CheckpointWriter(folder, threads)

    def counted(rows: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in rows:
            yield piece
            advance(piece.numel() * piece.element_size(), total)

    def write_part(file: int, name: str, start: int, stop: int, rows: Iterable[Tensor]) -> None:
        shape = (stop - start, *tensors[name].shape[1:])
        writer.write_part(file, name, start, shape, counted(rows))

    try:
        for name, made in tensors.items():
            writer.declare(name, made.shape, made.dtype)
        yield write_part
        for key in extra_states:
            writer.write_object(key, None)
        writer.finish(dict(common))
    finally:
        writer.close()


def derived_tokenizer(source: Path, was: RunConfig, config: RunConfig) -> Tokenizer:
    """That of a checkpoint; of Megatron-LM's own, which holds none, the config's.

    Args:
        was: the config of the checkpoint.
        config: what is made of it.

    Raises:
        UserError: neither has one (names the field to set), or the config names another.
    """
    data, before = config.data, was.data
    its = load_tokenizer(source) if holds_tokenizer(source) else None
    # What the config of the source names may be on another machine.
    if its is not None and (
        (data.tokenizer_type, data.tokenizer_model)
        == (before.tokenizer_type, before.tokenizer_model)
    ):
        return its
    named = build_tokenizer(
        data.tokenizer_type, data.tokenizer_model, vocab_size=config.model.vocab_size
    )
    if its is not None and (its.fingerprint, its.eod) != (named.fingerprint, named.eod):
        raise CheckpointError(
            f"data.tokenizer_model={data.tokenizer_model} is not the tokenizer of {source}, which "
            "is there as a copy; allowed: that one"
        )
    return named
