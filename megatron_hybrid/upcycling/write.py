"""An upcycled checkpoint, streamed: one of an MLP's matrices is in memory at a time.

Beside it there are blocks of a few MiB per thread. No model, no process group.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.derived import (
    BLOCK_BYTES,
    Advance,
    Beside,
    WritePart,
    Written,
    nbytes,
    new_checkpoint,
    parts,
    written_tensors,
)
from megatron_hybrid.checkpoint.progress import UPCYCLING, Progress
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.config import RunConfig, UpcyclingConfig
from megatron_hybrid.model.tensor_names import extra_states
from megatron_hybrid.upcycling.scheme import scheme_between
from megatron_hybrid.upcycling.tensors import Made, UpcycledTensors


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
            self._write_tensors(partial, advance)
            reader.verify()
            self._beside.write(partial, tensors.threads)
        total = sum(nbytes(made) for made in tensors.made.values())
        return Written(files.iteration_folder(save, iteration), len(tensors.made), total)

    @property
    def _iteration(self) -> int:
        return int(self._tensors.reader.common.get("iteration", 0))

    def _write_tensors(self, folder: Path, advance: Advance) -> None:
        """All tensors and the index of them."""
        tensors, made = self._tensors, self._tensors.made
        common = self._beside.common(self._iteration, UPCYCLING, asdict(self.scheme))
        states = extra_states(self._beside.config.model)
        with written_tensors(folder, made, states, common, tensors.threads, advance) as write_part:

            def copy(part: tuple[str, Made, int, int], file: int) -> None:
                name, each, start, stop = part
                write_part(file, name, start, stop, _rows(tensors, each, start, stop))

            in_threads(
                parts(item for item in made.items() if item[1].kind == "copied"),
                copy,
                tensors.threads,
            )
            for name, each in made.items():
                if each.kind != "copied":
                    _write_made(write_part, tensors, name, each)


def _write_made(write_part: WritePart, tensors: UpcycledTensors, name: str, made: Made) -> None:
    """One tensor of an upcycled layer; experts in threads, of one matrix in memory."""
    if made.kind == "experts":
        matrix = tensors.matrix(made)

        def work(expert: int, file: int) -> None:
            write_part(file, name, expert, expert + 1, tensors.expert(made, matrix, expert))

        in_threads(range(made.shape[0]), work, tensors.threads)
    else:
        write_part(0, name, 0, made.shape[0], [tensors.whole(made)])


def _rows(tensors: UpcycledTensors, made: Made, start: int, stop: int) -> Iterator[Tensor]:
    """Indices of dim 0 of a copied tensor, some of its rows at a time."""
    info = tensors.reader.tensors[made.source]
    rows, width = info.matrix
    of_index = rows // info.shape[0]
    step = max(1, BLOCK_BYTES // (width * made.dtype.itemsize))
    for first in range(start * of_index, stop * of_index, step):
        yield tensors.copied(made, first, min(first + step, stop * of_index))
