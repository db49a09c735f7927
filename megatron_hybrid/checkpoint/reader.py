"""Read tensors of a distributed checkpoint (torch_dist) one by one, whatever layout saved it.

No process group, no model. A tensor's rows are read straight from the parts of the files that hold
them; parts (chunks) were cut by the ranks that saved. "Rows" are those of the tensor as a matrix:
`[n, w]` of `[..., w]`, and `[n, 1]` of a vector `[n]`.
"""

import io
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.files import INDEX_FILE, INDEX_MODULES, INDEX_NAMES
from megatron_hybrid.checkpoint.inert_pickle import read_pickle
from megatron_hybrid.checkpoint.stored_tensor import FilePart, StoredTensor
from megatron_hybrid.config.tracker import CONFIG_FILE

COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor that one rank saved: where it lies in the tensor, and in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint.

    Attributes:
        chunks: its parts, which tile it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and width of the tensor as a matrix."""
        return as_matrix(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, width) of a shape: `[..., w]` is `[n, w]`, `[n]` is `[n, 1]`, `[]` is `[1, 1]`."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return torch.Size(shape[:-1]).numel(), shape[-1]


class CheckpointReader:
    """The tensors of one checkpoint. Several threads may read at once.

    Args:
        folder: the checkpoint itself, `.../iter_0000100` (see `find_checkpoint`).

    Attributes:
        tensors: by name, those of the optimizer included.
        objects: names of what is stored beside tensors.

    Raises:
        UserError: its index is missing, damaged, would run code, or does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        self._files: dict[str, int] = {}
        self._stored: dict[Chunk, StoredTensor] = {}
        self._lock = threading.Lock()
        try:
            self._object_places = {
                place.fqn: info
                for place, info in index.storage_data.items()
                if getattr(place, "offset", None) is None
            }
            self.tensors = MappingProxyType(dict(_tensor_infos(folder, index)))
        except (AttributeError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX_FILE} is damaged: {error!r}") from error
        self.objects = frozenset(index.state_dict_metadata) - frozenset(self.tensors)
        self._refuse_truncated(index)

    def _refuse_truncated(self, index: Any) -> None:
        """Every file that the index names must be there, and as long as the index says."""
        ends: dict[str, int] = {}
        for info in index.storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), end)
        problems = []
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if Path(name).name != name:
                problems.append(f"{INDEX_FILE} names {name!r}, which is not in the folder")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size < end:
                problems.append(f"{name} ends at byte {path.stat().st_size}; it should hold {end}")
        if problems:
            text = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"{self.folder} is damaged or not whole:\n{text}")

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._stored.clear()

    def read(self, name: str) -> Tensor:
        """A whole tensor, checked against its checksum.

        Raises:
            KeyError: there is none of that name.
            CheckpointError: its bytes are damaged.
        """
        info = self.tensors[name]
        rows = self.read_rows(name, 0, info.matrix[0])
        for chunk in info.chunks:
            self._open(info, chunk).verify()
        return rows.view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as a matrix: `[stop - start, width]`, its dtype.

        What was read is checked by `verify`.
        """
        info = self.tensors[name]
        rows = torch.empty(stop - start, info.matrix[1], dtype=info.dtype)
        for chunk in info.chunks:
            self._read_chunk(info, chunk, start, rows)
        return rows

    def verify(self) -> None:
        """Compare the checksums of all parts of which something was read; the rest is read now.

        Raises:
            CheckpointError: the bytes of one are damaged.
        """
        for stored in list(self._stored.values()):
            stored.verify()

    def _read_chunk(self, info: TensorInfo, chunk: Chunk, start: int, rows: Tensor) -> None:
        """Fill what of `rows` (those of the tensor from `start` on) lies in a chunk."""
        stop = start + rows.shape[0]
        width, first_column = _last(chunk.sizes), _last(chunk.offsets, 0)
        whole_rows = width == rows.shape[1]
        for row, chunk_row, count in _runs(info.shape, chunk):
            low, high = max(row, start), min(row + count, stop)
            if low >= high:
                continue
            target = rows[low - start : high - start]
            part = target if whole_rows else torch.empty(high - low, width, dtype=info.dtype)
            place = (chunk_row + low - row) * width * info.dtype.itemsize
            self._open(info, chunk).read_into(tensor_bytes(part), place)
            if not whole_rows:
                target[:, first_column : first_column + width] = part

    def _open(self, info: TensorInfo, chunk: Chunk) -> StoredTensor:
        with self._lock:
            if chunk not in self._stored:
                descriptor = self._descriptor(chunk.file)
                path = self.folder / chunk.file
                stored = StoredTensor(path, descriptor, chunk.start, chunk.length)
                if (stored.dtype, stored.shape) != (info.dtype, chunk.sizes):
                    raise CheckpointError(
                        f"{path} does not belong to this checkpoint: at byte {chunk.start} there "
                        f"should be {chunk.sizes} {info.dtype} of {info.name}, and there is "
                        f"{stored.shape} {stored.dtype}"
                    )
                self._stored[chunk] = stored
            return self._stored[chunk]

    def _descriptor(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._files[file]

    @cached_property
    def common(self) -> dict[str, Any]:
        """What belongs to no rank: `iteration`, `progress`, Megatron-LM's `args`, and so on.

        Read without running any of it; objects other than plain values are `Opaque`. Empty where
        the checkpoint has none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.folder / COMMON_FILE
        place = self._object_places.get(_COMMON_OBJECT)
        try:
            if path.is_file():
                return dict(_saved_object(io.BytesIO(path.read_bytes())))
            if place is None:
                return {}
            with self._lock:
                descriptor = self._descriptor(place.relative_path)
            return dict(_saved_object(FilePart(descriptor, place.offset, place.length))[0])
        except Exception as error:  # damaged bytes make zip and pickle stumble in any way
            file = path if place is None or path.is_file() else self.folder / place.relative_path
            raise CheckpointError(f"{file}: the common state is damaged: {error}") from error

    @property
    def config_file(self) -> Path | None:
        """The resolved config of the run, None in a checkpoint of Megatron-LM's own."""
        path = self.folder / CONFIG_FILE
        return path if path.is_file() else None


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, which can be read and written."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _last(sizes: tuple[int, ...], of_vector: int = 1) -> int:
    return sizes[-1] if len(sizes) > 1 else of_vector


def _runs(shape: tuple[int, ...], chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """(row of the tensor, row of the chunk, how many) of the rows that lie together in both."""
    if len(shape) < 2:
        yield (chunk.offsets[0], 0, chunk.sizes[0]) if shape else (0, 0, 1)
        return
    # Rows go on across an axis where the chunk has all of every axis behind it.
    axis = len(shape) - 2
    while axis and chunk.sizes[axis] == shape[axis]:
        axis -= 1
    behind = torch.Size(shape[axis + 1 : -1]).numel()
    count = chunk.sizes[axis] * behind
    for number, place in enumerate(np.ndindex(*chunk.sizes[:axis])):
        row = 0
        for size, offset, index in zip(shape, chunk.offsets, (*place, 0), strict=False):
            row = row * size + offset + index
        yield row * behind, number * count, count


def _saved_object(file: Any) -> Any:
    """What torch.save wrote, read without running it; tensors in it are not followed."""
    with zipfile.ZipFile(file) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return read_pickle(archive.read(name))


def _read_index(folder: Path) -> Any:
    """`.metadata`, a pickled `torch.distributed.checkpoint.metadata.Metadata`, as plain records.

    Neither run nor imported: what it may hold is what the trainer's own reader takes.
    """
    path = folder / INDEX_FILE

    def allowed(module: str, name: str) -> bool:
        records = module.startswith(INDEX_MODULES) and "." not in name
        return records or (module, name) in INDEX_NAMES

    try:
        return read_pickle(path.read_bytes(), allowed)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no .metadata") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except Exception as error:  # damaged bytes make pickle stumble in any way
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _tensor_infos(folder: Path, index: Any) -> Iterator[tuple[str, TensorInfo]]:
    places = {
        (place.fqn, getattr(place, "offset", None)): info
        for place, info in index.storage_data.items()
    }
    for name, stored in index.state_dict_metadata.items():
        if not hasattr(stored, "chunks"):
            continue
        chunks = []
        for part in stored.chunks:
            place = places.get((name, part.offsets))
            if place is None:
                raise CheckpointError(f"{folder / INDEX_FILE} is damaged: a part of {name} has no "
                                      f"place in any file")  # fmt: skip
            chunks.append(
                Chunk(
                    tuple(part.offsets), tuple(part.sizes),
                    place.relative_path, place.offset, place.length,
                )
            )  # fmt: skip
        dtype = stored.properties.state[0]  # TensorProperties.__getstate__
        info = TensorInfo(name, tuple(stored.size), dtype, tuple(chunks))
        if not _tile(info):
            raise CheckpointError(
                f"{folder / INDEX_FILE} is damaged: the parts of {name} do not make up {info.shape}"
            )
        yield name, info


def _tile(info: TensorInfo) -> bool:
    """Whether the chunks cover the tensor, each element once."""
    if len(info.chunks) == 1:
        return info.chunks[0].sizes == info.shape and not any(info.chunks[0].offsets)
    low = np.array([chunk.offsets for chunk in info.chunks]).reshape(len(info.chunks), -1)
    size = np.array([chunk.sizes for chunk in info.chunks]).reshape(len(info.chunks), -1)
    high = low + size
    volume = int(size.prod(axis=1).sum())
    if (low < 0).any() or (high > np.array(info.shape)).any():
        return False
    # No overlap and the right volume: sort along the axes, neighbours decide only in one
    # dimension, so every pair is looked at.
    overlap = (low[:, None] < high[None]).all(-1) & (low[None] < high[:, None]).all(-1)
    return volume == int(np.prod(info.shape)) and int(overlap.sum()) == len(info.chunks)
