"""One tensor as torch.save wrote it, somewhere in a file: where its bytes lie, and their checksum.

A distributed checkpoint's `.distcp` file is a sequence of such items. Each is an uncompressed zip
of a small pickle (dtype, shape, strides) and the bytes. Knowing where these are, any rows can be
read without the rest.
"""

import io
import os
import threading
import zipfile
import zlib
from collections.abc import Buffer
from pathlib import Path

import torch

from megatron_hybrid.checkpoint.checksum import whole_crc
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.inert_pickle import Opaque, read_pickle
from megatron_hybrid.fileio import read_ahead

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30
_STORED = zipfile.ZIP_STORED


class FilePart(io.RawIOBase):
    """`length` bytes of an open file from `offset` on, as a file of its own; safe with threads."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._place))
        got = os.preadv(self._descriptor, [view[:wanted]], self._offset + self._place)
        self._place += got
        return got


class StoredTensor:
    """A tensor inside an open file, contiguous there.

    Args:
        path: of the file, for messages.
        descriptor: the open file; it stays the caller's.
        offset, length: of the item in the file, in bytes.

    Attributes:
        dtype, shape: of the tensor.

    Raises:
        CheckpointError: the bytes are not such an item.
    """

    def __init__(self, path: Path, descriptor: int, offset: int, length: int) -> None:
        self.path, self._descriptor = path, descriptor
        self._blocks: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()
        try:
            with zipfile.ZipFile(FilePart(descriptor, offset, length)) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                record = read_pickle(archive.read(entries["data.pkl"]))
                self.dtype, self.shape, key, first = _tensor_record(record)
                info = entries[f"data/{key}"]
            if info.compress_type != _STORED:
                raise ValueError("it is compressed")
            self._crc, self._storage_bytes = info.CRC, info.file_size
            header = offset + info.header_offset
            self._storage = header + _local_header_size(os.pread(descriptor, 30, header))
        except Exception as error:  # damaged bytes make zip and pickle stumble in any way
            raise CheckpointError(
                f"{path} is damaged: no tensor can be read at byte {offset}: {error}"
            ) from error
        self._first = first * self.dtype.itemsize
        self.nbytes = self.dtype.itemsize * torch.Size(self.shape).numel()
        if self._first + self.nbytes > self._storage_bytes:
            raise CheckpointError(
                f"{path} is damaged: at byte {offset}, {self.shape} of {self.dtype} are said to lie"
                f" in {self._storage_bytes} bytes"
            )

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on.

        Raises:
            CheckpointError: the file ends before.
        """
        place = self._first + start
        self._pread(buffer, place)
        read_ahead(self._descriptor, self._storage + place + len(buffer))
        block = (place, len(buffer), zlib.crc32(buffer))
        with self._lock:
            self._blocks.append(block)

    def verify(self) -> None:
        """Compare the checksum of all bytes, read now or before, with the stored one.

        Raises:
            CheckpointError: it differs.
        """
        if not self._blocks:
            return

        def read(start: int, length: int) -> bytes:
            data = bytearray(length)
            self._pread(memoryview(data), start)
            return bytes(data)

        if whole_crc(self._blocks, self._storage_bytes, read) != self._crc:
            raise CheckpointError(
                f"{self.path} is damaged: the checksum of the tensor at byte {self._storage} "
                "differs from the stored one"
            )

    def _pread(self, buffer: memoryview, place: int) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(self._descriptor, [buffer[done:]], self._storage + place + done)
            if not got:
                raise CheckpointError(f"{self.path} is damaged: it ends too early")
            done += got


def _local_header_size(header: bytes) -> int:
    """Bytes before an entry's data: the fixed part, the name and the padding (APPNOTE 4.3.7)."""
    if header[:4] != b"PK\x03\x04":
        raise ValueError("no zip entry where there should be one")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return _LOCAL_HEADER_BYTES + name + extra


def _tensor_record(record: object) -> tuple[torch.dtype, tuple[int, ...], str, int]:
    """(dtype, shape, storage's key, its first element that is the tensor's) of a pickled tensor."""
    if not isinstance(record, Opaque) or record.path != "torch._utils._rebuild_tensor_v2":
        raise ValueError("it is not a plain tensor")
    (_, storage_type, key, *_), first, shape, stride, *_ = record.args
    dtype = _STORAGE_DTYPES.get(storage_type.path.removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"{storage_type.path} is not supported")
    expected = torch.empty(shape, device="meta").stride()
    if torch.Size(shape).numel() > 0 and any(
        n > 1 and a != b for n, a, b in zip(shape, stride, expected, strict=True)
    ):
        raise ValueError(f"its strides {stride} are not those of a contiguous tensor")
    return dtype, tuple(shape), str(key), int(first)
