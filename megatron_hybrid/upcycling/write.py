"""An upcycled checkpoint, streamed: one of an MLP's matrices is in memory at a time.

Beside it there are blocks of a few MiB per thread. No model, no process group.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.derived import Advance, Beside, Written, new_checkpoint, parts
from megatron_hybrid.checkpoint.progress import UPCYCLING, Progress
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.config import RunConfig, UpcyclingConfig
from megatron_hybrid.model.tensor_names import extra_states
from megatron_hybrid.upcycling.scheme import scheme_between
from megatron_hybrid.upcycling.tensors import BLOCK_BYTES, Made, UpcycledTensors


class Upcycling:
    """An upcycling of which everything is known but the bytes: nothing is written so far.

    Args:
        source: the dense checkpoint, `.../iter_0000100`, saved by any layout.
        dense, config: what it holds, and what is made of it.
        restart_schedule: the learning rate starts its schedule anew there.

    Attributes:
        scheme: how MLPs become experts.

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
        threads = threads or default_threads()
        with CheckpointReader(source) as reader:
            self._beside = Beside.find(
                reader, dense, config, restart_schedule=restart_schedule, threads=threads
            )
            config = self._beside.config
            self._tensors = UpcycledTensors(
                reader, dense.model, config.model, self.scheme, options, config.training.seed,
                threads,
            )  # fmt: skip

    @property
    def progress(self) -> Progress | None:
        """Where the dense run stood; None: unknown."""
        return self._beside.progress

    def write(self, save: Path, advance: Advance = lambda done, total: None) -> Written:
        """Write the checkpoint, at the dense one's step, into `save`.

        Args:
            save: the folder of checkpoints to be; it must not exist, or be empty.
            advance: told bytes written since the last call, and bytes in all.

        Raises:
            UserError: a file is damaged, or something is at `save`; nothing that loads is left
                there.
        """
        tensors, iteration = self._tensors, self._iteration
        with (
            tensors.reader as reader, new_checkpoint(save, iteration, "upcycle") as partial
        ):  # fmt: skip
            total = _write_tensors(partial, tensors, self._beside.config, self._common(), advance)
            reader.verify()
            self._beside.write(partial, tensors.threads)
        return Written(files.iteration_folder(save, iteration), len(tensors.made), total)

    @property
    def _iteration(self) -> int:
        return int(self._tensors.reader.common.get("iteration", 0))

    def _common(self) -> dict[str, Any]:
        """The part of the checkpoint that belongs to no rank: counters, as in the dense one."""
        common = {
            "checkpoint_version": 3.0,
            "iteration": self._iteration,
            UPCYCLING: {"from": str(self._beside.source), **asdict(self.scheme)},
        }
        return common if self.progress is None else common | {"progress": vars(self.progress)}


def _write_tensors(
    folder: Path,
    tensors: UpcycledTensors,
    config: RunConfig,
    common: dict[str, Any],
    advance: Advance,
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


def nbytes(made: Made) -> int:
    """Size of a tensor in bytes."""
    return torch.Size(made.shape).numel() * made.dtype.itemsize


def _parts(tensors: list[tuple[str, Made]]) -> Iterator[tuple[str, Made, int, int]]:
    """Copied tensors in parts along dim 0: name, tensor, first index, index after the last."""
    for name, made in tensors:
        for start, stop in parts(made.shape, made.dtype.itemsize):
            yield name, made, start, stop


def _rows(tensors: UpcycledTensors, made: Made, start: int, stop: int) -> Iterator[Tensor]:
    """Indices of dim 0 of a copied tensor, some of its rows at a time."""
    info = tensors.reader.tensors[made.source]
    rows, width = info.matrix
    of_index = rows // info.shape[0]
    step = max(1, BLOCK_BYTES // (width * made.dtype.itemsize))
    for first in range(start * of_index, stop * of_index, step):
        yield tensors.copied(made, first, min(first + step, stop * of_index))
