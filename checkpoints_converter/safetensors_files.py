"""Read and write safetensors by rows: a header that says where each tensor lies, then raw bytes.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length in little endian; the
header, JSON; the bytes of the tensors, row-major, without holes. Files made here are the bytes that
the library itself would make: tensors ordered by dtype, then by name, the header padded to 8 bytes.
"""

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.loading_order import SINGLE_FILE, differences, weight_map
from megatron_hybrid.checkpoint.checksum import whole_crc
from megatron_hybrid.checkpoint.reader import as_matrix, tensor_bytes
from megatron_hybrid.fileio import read_ahead, sync_folder
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming, read_json

CHECKSUMS_FILE = "checksums.json"  # ours: CRC-32 of every tensor, for whoever imports the folder
# In the order in which the library writes them: widest first.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_ORDER = {name: place for place, name in enumerate(DTYPES)}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; its bytes begin at byte `start` of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Crcs:
    """CRC-32 of tensors that pass by in blocks, in any order and by several threads."""

    def __init__(self) -> None:
        self._blocks: dict[str, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, content: memoryview) -> None:
        """Take note of a tensor's bytes from byte `start` on."""
        block = (start, len(content), zlib.crc32(content))
        with self._lock:
            self._blocks.setdefault(name, []).append(block)

    def names(self) -> list[str]:
        """Tensors of which something has passed."""
        return list(self._blocks)

    def whole(self, name: str, nbytes: int, read: Callable[[int, int], bytes]) -> int:
        """The CRC-32 of a whole tensor; `read` gives what has not passed (`whole_crc`)."""
        return whole_crc(self._blocks[name], nbytes, read)


class SafetensorsReader:
    """The tensors of a Hugging Face folder. Several threads may read at once.

    Attributes:
        tensors: by name.
        fingerprints: what the shards' own metadata say of the model they belong to, by file.
        checksums: CRC-32 of tensors, which a folder that was exported here has; else empty.

    Raises:
        ConversionError: files are missing, cut off, damaged, or not those of the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._crcs = Crcs()
        self.checksums = _read_checksums(folder)
        tensors: dict[str, Entry] = {}
        problems: list[str] = []
        self.fingerprints: dict[str, str] = {}
        places = weight_map(folder)
        for file in sorted(set(places.values())) if places is not None else [SINGLE_FILE]:
            try:
                entries, metadata = read_header(folder / file)
            except ConversionError as error:
                problems.append(str(error))
                continue
            if "fingerprint" in metadata:
                self.fingerprints[file] = metadata["fingerprint"]
            tensors.update({entry.name: entry for entry in entries})
            if places is not None:
                problems += differences(file, places, {entry.name for entry in entries})
        if len(set(self.fingerprints.values())) > 1:
            problems.append(f"its files belong to different models: {self.fingerprints}")
        if self.checksums and (odd := sorted(self.checksums.keys() ^ tensors.keys())):
            problems.append(f"{CHECKSUMS_FILE} is of other files: {', '.join(odd[:3])}")
        if problems:
            text = "\n".join(f"  - {problem}" for problem in problems)
            raise ConversionError(f"{folder} cannot be read:\n{text}")
        self.tensors = MappingProxyType(tensors)

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self.tensors[name]
        return self.read_rows(name, 0, as_matrix(entry.shape)[0]).view(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as a matrix: `[stop - start, width]`, its dtype."""
        entry = self.tensors[name]
        width = as_matrix(entry.shape)[1]
        rows = torch.empty(stop - start, width, dtype=entry.dtype)
        first = start * width * entry.dtype.itemsize
        buffer = tensor_bytes(rows)
        self._fill(entry, buffer, first)
        if self.checksums:
            self._crcs.add(name, first, buffer)
        return rows

    def verify(self) -> None:
        """Compare the checksums of all tensors of which something was read; the rest is read now.

        Raises:
            ConversionError: a tensor is not what was exported.
        """
        for name in self._crcs.names():
            entry = self.tensors[name]

            def read(start: int, length: int, entry: Entry = entry) -> bytes:
                data = bytearray(length)
                self._fill(entry, memoryview(data), start)
                return bytes(data)

            if self._crcs.whole(name, entry.nbytes, read) != self.checksums[name]:
                raise ConversionError(
                    f"{self.folder / entry.file} is damaged, or of another model: the checksum of "
                    f"{name} differs from that in {CHECKSUMS_FILE}"
                )

    def _fill(self, entry: Entry, buffer: memoryview, first: int) -> None:
        """Read a tensor's bytes from byte `first` on."""
        place, done = entry.start + first, 0
        while done < len(buffer):
            got = os.preadv(self._descriptor(entry.file), [buffer[done:]], place + done)
            if not got:
                raise ConversionError(f"{self.folder / entry.file} ends within {entry.name}")
            done += got
        read_ahead(self._descriptor(entry.file), place + done)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._descriptors[file]


def _read_checksums(folder: Path) -> dict[str, int]:
    """CRC-32 by tensor; empty where the folder has none.

    Raises:
        ConversionError: the file of them is damaged.
    """
    path = folder / CHECKSUMS_FILE
    if not path.exists():
        return {}
    with naming(path, ConversionError):
        found = read_json(path, ConversionError)["crc32"]
        return {str(name): int(value, 16) for name, value in found.items()}


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """(tensors, metadata) of one file, whose size is checked.

    Raises:
        ConversionError: the file is missing, cut off, or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise ValueError(f"its header would be {length} bytes long, of {size}")
            header = parse_json(file.read(length).decode())
        metadata = header.pop(_METADATA, {})
        entries, end = _entries(path, header, _LENGTH_BYTES + length)
    except FileNotFoundError:
        raise ConversionError(f"{path.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path.name} is damaged: {error}") from error
    if end != size:
        what = "cut off" if size < end else "damaged"
        raise ConversionError(f"{path.name} is {what}: it has {size} bytes, its header says {end}")
    return entries, metadata


def _entries(path: Path, header: Mapping[str, Any], first: int) -> tuple[list[Entry], int]:
    """The tensors of a header, and the byte where the last one ends; without holes between them."""
    entries, end = [], first
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if said["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of dtype {said['dtype']}; allowed: {', '.join(DTYPES)}")
        shape = tuple(int(length) for length in said["shape"])
        entry = Entry(name, shape, DTYPES[said["dtype"]], path.name, end)
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has the shape {shape}")
        if said["data_offsets"] != [end - first, end - first + entry.nbytes]:
            raise ValueError(
                f"{name}, {shape} {said['dtype']}, is said to lie at bytes {said['data_offsets']}; "
                f"it must be {[end - first, end - first + entry.nbytes]}"
            )
        entries.append(entry)
        end += entry.nbytes
    return entries, end


class SafetensorsWriter:
    """One file, written in rows in any order by several threads; it has its name when it is whole.

    Args:
        path: of the file to be; nothing is there until `finish`.
        tensors: (name, shape, dtype) of all that it will hold.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self._partial = path.with_name(f".{path.name}.part")
        ordered = sorted(tensors, key=lambda t: (_DTYPE_ORDER[_DTYPE_NAMES[t[2]]], t[0]))
        header: dict[str, Any] = {_METADATA: dict(metadata)}
        end = 0
        for name, shape, dtype in ordered:
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)
        first = _LENGTH_BYTES + len(text)
        self.entries = {
            name: Entry(name, shape, dtype, path.name, first + header[name]["data_offsets"][0])
            for name, shape, dtype in ordered
        }
        self._crcs = Crcs()
        self._file = self._partial.open("wb")
        try:
            self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            self._file.flush()
            # Not sparse: a disk that is too small is found here, not in the middle.
            os.posix_fallocate(self._file.fileno(), 0, first + end)
        except BaseException:
            self.discard()
            raise

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor as a matrix, `[n, width]`, at its row `start`."""
        entry = self.entries[name]
        assert rows.dtype == entry.dtype
        place = entry.start + start * as_matrix(entry.shape)[1] * entry.dtype.itemsize
        buffer, done = tensor_bytes(rows.contiguous()), 0
        self._crcs.add(name, place - entry.start, buffer)
        while done < len(buffer):
            done += os.pwrite(self._file.fileno(), buffer[done:], place + done)

    def checksums(self) -> dict[str, int]:
        """CRC-32 of every tensor, once every row is written."""

        def none_missing(start: int, length: int) -> bytes:
            raise AssertionError(f"bytes {start} to {start + length} were not written")

        return {
            name: self._crcs.whole(name, entry.nbytes, none_missing) if entry.nbytes else 0
            for name, entry in self.entries.items()
        }

    def finish(self) -> None:
        """Every row is written: make it last, and give it its name."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._partial.unlink()
