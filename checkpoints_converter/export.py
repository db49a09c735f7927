"""From a distributed checkpoint to a Hugging Face folder."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_converter.carried_files import as_they_were
from checkpoints_converter.family import Family
from checkpoints_converter.hugging_face_files import write_small_files
from checkpoints_converter.loading_order import INDEX_FILE, SINGLE_FILE
from checkpoints_converter.output_folder import CARRIED_NAMES, output_folder
from checkpoints_converter.registry import family_for
from checkpoints_converter.safetensors_files import CHECKSUMS_FILE, SafetensorsWriter
from checkpoints_converter.streaming import (
    BLOCK_BYTES,
    DTYPES,
    Block,
    blocks,
    make_rows,
    stored_dtype,
    whole,
)
from checkpoints_converter.weights import Names, Recipe, recipes_of_theirs, refuse_other_tensors
from megatron_hybrid.checkpoint.carried import read_carried
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.integrity import verify_integrity
from megatron_hybrid.checkpoint.reader import CheckpointReader, tensor_bytes
from megatron_hybrid.checkpoint.saved_config import saved_config
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.checkpoint.threads import default_threads, in_threads
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.effects import differences
from megatron_hybrid.config.layers import in_the_model
from megatron_hybrid.fileio import file_errors, write_atomic
from megatron_hybrid.model.tensor_names import NO_WEIGHTS, PREDICTION

_FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        family: model_type to export as; None for the first that holds the model exactly.
        model: preset or YAML file that describes the model, where the checkpoint does not.
        dtype: of the weights, a key of DTYPES; None as they are stored. What decides about decay
            and routing (A_log, D, dt_bias, expert biases) is never cast down.
        max_shard_bytes: of one file.
        force: replace a model folder that is there.
        in_place: write the folder under its own name, shard after shard, config.json last.
        verify_integrity: compare the checkpoint's files with its manifest first.
    """

    family: str | None = None
    model: str | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    threads: int | None = None
    force: bool = False
    in_place: bool = False
    verify_integrity: bool = True


@dataclass(frozen=True)
class Made:
    """A tensor of the export: how it is made, and of which dtype."""

    recipe: Recipe
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.recipe.spec.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Exported:
    """What came of an export; `notes` hold, but the user should know them."""

    folder: Path
    family: str
    tensors: int
    nbytes: int
    shards: int
    notes: tuple[str, ...]


def export(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: one checkpoint, a folder of them or a run: the newest.
        out: the folder to be.
        advance: told bytes written since the last call, and bytes in all.

    Raises:
        UserError: the checkpoint is damaged, is not the model that its config says, or cannot be
            held exactly by the family; nothing is left at `out`.
    """
    with file_errors(out), CheckpointReader(find_checkpoint(checkpoint)) as reader:
        if options.verify_integrity:
            threads = options.threads or default_threads()
            verify_integrity(reader.folder, saved_config(reader.folder), threads)
        config = source_config(reader, options.model)
        config = config.model_copy(update={"model": in_the_model(config.model)})
        family = family_for(config.model, options.family)
        weights = {
            name: info
            for name, info in reader.tensors.items()
            if not any(part in name for part in NO_WEIGHTS)
        }
        left_out = [name for name in weights if name.startswith(PREDICTION)]
        for name in left_out if config.model.mtp_num_layers else ():
            del weights[name]
        table = family.table(config.model, Names(weights), Names())
        refuse_other_tensors(
            f"{reader.folder} does not hold the model of its config:",
            (spec for mapping in table for spec in mapping.ours),
            {name: info.shape for name, info in weights.items()},
        )
        dtypes = {name: info.dtype for name, info in weights.items()}
        asked = DTYPES[options.dtype] if options.dtype else None
        made = [
            Made(recipe, stored_dtype(recipe, dtypes, asked)) for recipe in recipes_of_theirs(table)
        ]
        with output_folder(out, force=options.force, in_place=options.in_place) as folder:
            shards = _write_weights(folder, reader, made, options, advance)
            reader.verify()
            notes = _complete(folder, reader, config, family, made)
    total = sum(tensor.nbytes for tensor in made)
    notes += differences(config)
    if config.model.mtp_num_layers:
        notes.append(
            f"left out: the modules of multi-token prediction, {len(left_out)} tensors, which "
            "transformers has not; the model without them is whole"
        )
    return Exported(out, family.model_type, len(made), total, shards, tuple(notes))


def plan_shards(made: Sequence[Made], max_bytes: int) -> list[list[Made]]:
    """Tensors in their order, cut into files of at most `max_bytes` (or of one tensor)."""
    shards: list[list[Made]] = [[]]
    size = 0
    for tensor in made:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_weights(
    folder: Path,
    reader: CheckpointReader,
    made: Sequence[Made],
    options: ExportOptions,
    advance: Callable[[int, int], None],
) -> int:
    """Write the shards, in their order, and the index that names them; how many there are."""
    shards = plan_shards(made, options.max_shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) > 1:
        metadata["fingerprint"] = _fingerprint(made, reader)
    names = [
        SINGLE_FILE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    total = sum(tensor.nbytes for tensor in made)
    advance(0, total)
    open_shards = _OpenShards(folder, names, shards, metadata)

    def work(item: tuple[int, Made, Block], _: int) -> None:
        shard, tensor, block = item
        rows = make_rows(block, tensor.dtype, reader)
        open_shards.write(shard, block, rows)
        advance(rows.numel() * rows.element_size(), total)

    items = (
        (number, tensor, block)
        for number, shard in enumerate(shards)
        for tensor in shard
        for block in blocks(whole(tensor.recipe), BLOCK_BYTES, tensor.dtype.itemsize)
    )
    try:
        in_threads(items, work, options.threads or default_threads())
    finally:
        open_shards.discard()
    checksums = {name: f"{crc:08x}" for name, crc in sorted(open_shards.checksums.items())}
    content = {"crc32": checksums, CARRIED_NAMES: sorted(as_they_were(read_carried(reader.folder)))}
    write_atomic(folder / CHECKSUMS_FILE, json.dumps(content, indent=1) + "\n")
    if len(shards) > 1:
        weight_map = {
            tensor.recipe.spec.name: name
            for name, shard in zip(names, shards, strict=True)
            for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomic(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return len(shards)


class _OpenShards:
    """The files being written: opened at their first block, finished with their last."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        shards: Sequence[Sequence[Made]],
        metadata: Mapping[str, str],
    ) -> None:
        self._folder, self._names, self._shards = folder, names, shards
        self._metadata = metadata
        self._left = [sum(tensor.nbytes for tensor in shard) for shard in shards]
        self._writers: dict[int, SafetensorsWriter] = {}
        self._lock = threading.Lock()
        self.checksums: dict[str, int] = {}

    def write(self, shard: int, block: Block, rows: torch.Tensor) -> None:
        with self._lock:
            if shard not in self._writers:
                self._writers[shard] = SafetensorsWriter(
                    self._folder / self._names[shard],
                    [(t.recipe.spec.name, t.recipe.spec.shape, t.dtype)
                     for t in self._shards[shard]],
                    self._metadata,
                )  # fmt: skip
            writer = self._writers[shard]
        writer.write_rows(block.recipe.spec.name, block.start, rows)
        with self._lock:
            self._left[shard] -= rows.numel() * rows.element_size()
            finished = not self._left[shard]
        if finished:
            checksums = writer.checksums()
            writer.finish()
            with self._lock:
                self.checksums |= checksums
                del self._writers[shard]

    def discard(self) -> None:
        """Remove what is unfinished."""
        for writer in self._writers.values():
            writer.discard()


def _fingerprint(made: Sequence[Made], reader: CheckpointReader) -> str:
    """A hash of the small tensors (norms, decays), so that shards of two models are told apart."""
    digest = hashlib.sha256()
    for tensor in made:
        if tensor.nbytes <= _FINGERPRINT_BYTES:
            rows = make_rows(whole(tensor.recipe), tensor.dtype, reader)
            digest.update(tensor_bytes(rows))
    return digest.hexdigest()


def _complete(
    folder: Path,
    reader: CheckpointReader,
    config: RunConfig,
    family: Family,
    made: Sequence[Made],
) -> list[str]:
    """The files beside the weights; config.json comes last, and makes the folder a model."""
    bytes_of: dict[torch.dtype, int] = {}
    for tensor in made:
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    commonest = max(bytes_of, key=lambda dtype: bytes_of[dtype])
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in made)
    return write_small_files(
        folder,
        reader.folder,
        config,
        family,
        dtype=str(commonest).removeprefix("torch."),
        parameters=parameters,
    )
