"""An upcycled checkpoint, streamed: one of an MLP's matrices is in memory at a time.

Beside it there are blocks of a few MiB per thread. No model, no process group.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.carried import carried_on, write_carried
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.integrity import verify_integrity, write_integrity
from megatron_hybrid.checkpoint.progress import UPCYCLING, Progress, saved_progress
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.same_samples import refuse_other_samples
from megatron_hybrid.checkpoint.saved_config import saved_config
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.claim import CLAIM_FILE, claim_file, claimed
from megatron_hybrid.config import CONFIG_FILE, RunConfig, UpcyclingConfig
from megatron_hybrid.data.saved_files import DATA_FILES_FILE
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE
from megatron_hybrid.data.tokenizer import (
    Tokenizer,
    build_tokenizer,
    holds_tokenizer,
    load_tokenizer,
)
from megatron_hybrid.fileio import file_errors, write_atomic
from megatron_hybrid.model.tensor_names import extra_states
from megatron_hybrid.upcycling.scheme import scheme_between
from megatron_hybrid.upcycling.tensors import BLOCK_BYTES, Made, UpcycledTensors

# Of a copied tensor in one piece of a file, as a rank reads whole pieces to take its share of them.
PART_BYTES = 64 << 20


@dataclass(frozen=True)
class Written:
    """What came of an upcycling."""

    folder: Path
    tensors: int
    nbytes: int


class Upcycling:
    """An upcycling of which everything is known but the bytes: nothing is written so far.

    Args:
        source: the dense checkpoint, `.../iter_0000100`, saved by any layout.
        dense, config: what it holds, and what is made of it.
        restart_schedule: the learning rate starts its schedule anew there.

    Attributes:
        scheme: how MLPs become experts.
        progress: where the dense run stood; None: unknown.

    Raises:
        UserError: one cannot be made of the other, the checkpoint does not hold what it says, has
            neither a tokenizer that fits nor counters where they are needed, or has counted other
            samples than those that the config goes on with.
    """

    def __init__(
        self,
        source: Path,
        dense: RunConfig,
        config: RunConfig,
        options: UpcyclingConfig,
        *,
        restart_schedule: bool = True,
        threads: int | None = None,
    ) -> None:
        self.scheme = scheme_between(dense.model, config.model, scale_weights=options.scale_weights)
        self._tokenizer = _tokenizer(source, dense, config)
        if config.checkpoint.verify_integrity:
            verify_integrity(source, saved_config(source), threads or default_threads())
        self._source = source
        self._config = config = config.with_vocab_size(self._tokenizer.vocab_size)
        with CheckpointReader(source) as reader:
            self.progress = _progress(reader, config, restart_schedule)
            saved = saved_config(source)
            if saved is not None and self.progress is not None and self.progress.consumed_samples:
                has_plan = (source / DATA_PLAN_FILE).exists()
                refuse_other_samples(source, config, saved, has_plan=has_plan)
            self._tensors = UpcycledTensors(
                reader, dense.model, config.model, self.scheme, options, config.training.seed,
                threads or default_threads(),
            )  # fmt: skip

    def write(
        self, save: Path, advance: Callable[[int, int], None] = lambda done, total: None
    ) -> Written:
        """Write the checkpoint, at the dense one's step, into `save`.

        Args:
            save: the folder of checkpoints to be; it must not exist, or be empty.
            advance: told bytes written since the last call, and bytes in all.

        Raises:
            UserError: a file is damaged, or something is at `save`; nothing that loads is left
                there.
        """
        refuse_to_replace(save)
        tensors, config = self._tensors, self._config
        iteration = self._iteration
        with (
            file_errors(save), claimed([claim_file(save)], "upcycle"), tensors.reader as reader,
            _one_thread_an_operation(),
        ):  # fmt: skip
            refuse_to_replace(save)  # what another one has written meanwhile
            files.start_partial(save, iteration)
            partial = files.partial_folder(save, iteration)
            try:
                total = _write_tensors(partial, tensors, config, self._common(), advance)
                reader.verify()
                _complete(self._source, partial, config, self._tokenizer, tensors.threads)
                files.put_in_place(save, iteration)
            except BaseException:
                files.discard_partial(save, iteration)
                raise
        return Written(files.iteration_folder(save, iteration), len(tensors.made), total)

    @property
    def _iteration(self) -> int:
        return int(self._tensors.reader.common.get("iteration", 0))

    def _common(self) -> dict[str, Any]:
        """The part of the checkpoint that belongs to no rank: counters, as in the dense one."""
        common = {
            "checkpoint_version": 3.0,
            "iteration": self._iteration,
            UPCYCLING: {"from": str(self._source), **asdict(self.scheme)},
        }
        return common if self.progress is None else common | {"progress": vars(self.progress)}


def refuse_to_replace(save: Path) -> None:
    """Refuse a place where something is.

    Raises:
        CheckpointError: naming it; what a killed upcycling left does not count.
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
    """Where the upcycled run stands.

    Raises:
        CheckpointError: the schedule is to start anew, and nothing says after how many samples.
    """
    progress = saved_progress(reader.folder, reader.common, config)
    if progress is not None:
        progress.loss_average = None  # of another model
        if restart_schedule:
            progress.schedule_start_samples = progress.consumed_samples
    elif restart_schedule:
        raise CheckpointError(
            f"{reader.folder} does not say how many samples were read in its "
            f"{reader.common.get('iteration', 0)} steps, after which the schedule of the learning "
            "rate would start anew; --no-restart-schedule lets it go on"
        )
    return progress


def _write_tensors(
    folder: Path,
    tensors: UpcycledTensors,
    config: RunConfig,
    common: dict[str, Any],
    advance: Callable[[int, int], None],
) -> int:
    """All tensors and the index of them; how many bytes they have."""
    threads = tensors.threads
    total = sum(nbytes(made) for made in tensors.made.values())
    advance(0, total)
    writer = CheckpointWriter(folder, threads)

    def counted(pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            yield piece
            advance(piece.numel() * piece.element_size(), total)

    try:
        for name, made in tensors.made.items():
            writer.declare(name, made.shape, made.dtype)
        copied = [item for item in tensors.made.items() if item[1].kind == "copied"]

        def copy(part: tuple[str, Made, int, int], file: int) -> None:
            name, made, start, stop = part
            rows = counted(_rows(tensors, made, start, stop))
            writer.write_part(file, name, start, (stop - start, *made.shape[1:]), rows)

        in_threads(_parts(copied), copy, threads)
        for name, made in tensors.made.items():
            if made.kind != "copied":
                _write_made(writer, tensors, name, made, counted)
        for key in extra_states(config.model):
            writer.write_object(key, None)
        writer.finish(common)
    finally:
        writer.close()
    return total


def _write_made(
    writer: CheckpointWriter,
    tensors: UpcycledTensors,
    name: str,
    made: Made,
    counted: Callable[[Iterator[Tensor]], Iterator[Tensor]],
) -> None:
    """One tensor of an upcycled layer; experts in threads, of one matrix in memory."""
    if made.kind == "experts":
        matrix = tensors.matrix(made)

        def work(expert: int, file: int) -> None:
            rows = counted(tensors.expert(made, matrix, expert))
            writer.write_part(file, name, expert, (1, *made.shape[1:]), rows)

        in_threads(range(made.shape[0]), work, tensors.threads)
    else:
        writer.write_part(0, name, 0, made.shape, counted(iter([tensors.whole(made)])))


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


def nbytes(made: Made) -> int:
    """Size of a tensor in bytes."""
    return torch.Size(made.shape).numel() * made.dtype.itemsize


def _parts(tensors: list[tuple[str, Made]]) -> Iterator[tuple[str, Made, int, int]]:
    """Copied tensors in parts along dim 0: name, tensor, first index, index after the last."""
    for name, made in tensors:
        length = made.shape[0]
        step = max(1, PART_BYTES * length // max(1, nbytes(made)))
        for start in range(0, length, step):
            yield name, made, start, min(start + step, length)


def _rows(tensors: UpcycledTensors, made: Made, start: int, stop: int) -> Iterator[Tensor]:
    """Indices of dim 0 of a copied tensor, some of its rows at a time."""
    info = tensors.reader.tensors[made.source]
    rows, width = info.matrix
    of_index = rows // info.shape[0]
    step = max(1, BLOCK_BYTES // (width * made.dtype.itemsize))
    for first in range(start * of_index, stop * of_index, step):
        yield tensors.copied(made, first, min(first + step, stop * of_index))


def _tokenizer(source: Path, dense: RunConfig, config: RunConfig) -> Tokenizer:
    """That of the dense checkpoint; of Megatron-LM's own, which holds none, the config's.

    Raises:
        UserError: neither has one (names the field to set), or the config names another.
    """
    data, was = config.data, dense.data
    its = load_tokenizer(source) if holds_tokenizer(source) else None
    # What the dense run's config names may be on another machine.
    if its is not None and (
        (data.tokenizer_type, data.tokenizer_model) == (was.tokenizer_type, was.tokenizer_model)
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


def _complete(
    source: Path, partial: Path, config: RunConfig, tokenizer: Tokenizer, threads: int
) -> None:
    """The files beside the tensors: config, tokenizer, plan of the data, checksums."""
    write_atomic(partial / CONFIG_FILE, config.to_yaml())
    tokenizer.save_copy(partial)
    write_carried(partial, carried_on(source, tokenizer))
    for name in (DATA_PLAN_FILE, DATA_FILES_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    if config.checkpoint.verify_integrity:
        write_integrity(partial, threads)
