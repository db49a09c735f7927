"""Write a distributed checkpoint (torch_dist) part by part, without a process group or a model."""

import json
import os
import pickle
import threading
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_hybrid.checkpoint.files import INDEX_FILE
from megatron_hybrid.checkpoint.reader import tensor_bytes
from megatron_hybrid.checkpoint.tensor_item import TensorItem
from megatron_hybrid.fileio import write_atomic

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_OBJECT = "common_state/shard_0_1"


class CheckpointWriter:
    """Appends parts of tensors to a few files, and writes the index of them all at the end.

    A file may be written by one thread at a time; different files by several.

    Args:
        folder: exists, and is empty.
        files: how many `.distcp` files to write.
    """

    def __init__(self, folder: Path, files: int) -> None:
        self.folder = folder
        self._names = [f"__0_{number}.distcp" for number in range(files)]
        self._files: list[BinaryIO] = [(folder / name).open("wb") for name in self._names]
        self._states: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files, whether they are whole or not."""
        for file in self._files:
            file.close()

    def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Say that there will be a tensor; its parts follow, which must tile it."""
        properties = TensorProperties(dtype=dtype)
        self._states[name] = TensorStorageMetadata(properties, torch.Size(shape), [])

    def write_part(
        self, file: int, name: str, offset: int, shape: tuple[int, ...], rows: Iterable[Tensor]
    ) -> None:
        """Write a part of a declared tensor: indices from `offset` on along dim 0.

        Args:
            file: number of the file to append to.
            shape: of the part; only its dim 0 differs from the tensor's.
            rows: its elements in their order, contiguous on the CPU, in any number of pieces.
        """
        state = self._states[name]
        assert isinstance(state, TensorStorageMetadata)
        item = TensorItem(shape, state.properties.dtype)
        stream = self._files[file]
        start = stream.tell()
        stream.write(bytes(item.before))
        crc = 0
        for piece in rows:
            assert piece.dtype == state.properties.dtype
            content = tensor_bytes(piece)
            crc = zlib.crc32(content, crc)
            stream.write(content)
        assert stream.tell() == start + item.before + item.nbytes, name
        before, after = item.around(crc)
        stream.write(after)
        length = stream.tell() - start
        stream.seek(start)
        stream.write(before)
        stream.seek(start + length)
        offsets = torch.Size((offset, *[0] * (len(shape) - 1)))
        with self._lock:
            state.chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
            index = MetadataIndex(name, offsets)
            self._places[index] = _StorageInfo(self._names[file], start, length)

    def write_object(self, key: str, value: Any) -> None:
        """Write an object of plain values, as the engine stores what is no tensor."""
        stream = self._files[0]
        start = stream.tell()
        torch.save([value], stream)
        length = stream.tell() - start
        self._states[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = _StorageInfo(self._names[0], start, length)

    def finish(self, common: dict[str, Any]) -> None:
        """Write what belongs to no rank, and the index; the checkpoint is whole.

        Args:
            common: plain values, such as `iteration`.
        """
        self.write_object(_COMMON_OBJECT, common)
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for state in self._states.values():
            if isinstance(state, TensorStorageMetadata):
                state.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
        index = Metadata(self._states, storage_data=self._places)
        write_atomic(self.folder / "metadata.json", json.dumps(_FORMAT))
        write_atomic(self.folder / INDEX_FILE, pickle.dumps(index))
