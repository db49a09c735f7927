"""One tensor as torch.save would write it, in blocks: the counterpart of `stored_tensor`.

torch.save wants the whole tensor, and holds the interpreter's lock while it sums and writes.

An item is an uncompressed zip (PKWARE APPNOTE 4.3) of a pickle, the byte order, a version, and the
tensor's bytes. The bytes' checksum stands before and after them, so what is before is written last.
"""

import collections
import io
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from typing import Any

import torch

MAX_BYTES = 2**32 - 2**16  # what a zip without extensions for long files can hold
_ALIGNMENT = 64
_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_PAD_FIELD = struct.Struct("<2sH")  # an extra field, as torch fills it up
_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage, torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage, torch.int32: torch.IntStorage, torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage, torch.bool: torch.BoolStorage,
}  # fmt: skip


class TensorItem:
    """What stands around a tensor's bytes in a file.

    Attributes:
        nbytes: of the tensor.
        before: bytes before the tensor's.

    Raises:
        ValueError: the tensor is larger than MAX_BYTES, or of a dtype without a storage class.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        elements = torch.Size(shape).numel()
        self.nbytes = elements * dtype.itemsize
        if dtype not in _STORAGES or self.nbytes > MAX_BYTES:
            raise ValueError(f"a tensor of {self.nbytes} bytes, {dtype}, cannot be saved")
        record = io.BytesIO()
        _Pickler(record, dtype, elements).dump(_TensorCall(shape))
        self._small = (
            ("archive/data.pkl", record.getvalue()),
            ("archive/byteorder", sys.byteorder.encode()),
            ("archive/version", b"3\n"),
        )
        self.before = len(self.around(0)[0])

    def around(self, crc: int) -> tuple[bytes, bytes]:
        """(before, after): what stands before and after the tensor's bytes.

        Args:
            crc: CRC-32 of these bytes.
        """
        before, directory = b"", b""
        small = [(name, len(content), zlib.crc32(content)) for name, content in self._small]
        for number, (text, size, entry_crc) in enumerate(
            [*small, ("archive/data/0", self.nbytes, crc)]
        ):
            name, place = text.encode(), len(before)
            first = place + _LOCAL.size + len(name) + _PAD_FIELD.size
            padding = -first % _ALIGNMENT
            extra = _PAD_FIELD.pack(b"FB", padding) + b"Z" * padding
            sums = (entry_crc, size, size, len(name))
            before += _LOCAL.pack(b"PK\x03\x04", 0, 0, 0, 0, 0, *sums, len(extra)) + name + extra
            directory += _CENTRAL.pack(b"PK\x01\x02", 0, 0, 0, 0, 0, 0, *sums, 0, 0, 0, 0, 0, place)
            directory += name
            if number < len(self._small):
                before += self._small[number][1]
        entries = len(self._small) + 1
        place = len(before) + self.nbytes
        end = _END.pack(b"PK\x05\x06", 0, 0, entries, entries, len(directory), place, 0)
        return before, directory + end


class _Storage:
    """Stands for the tensor's bytes while the pickle is made."""


class _TensorCall:
    """Pickles as the call that makes the tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        strides = torch.empty(self._shape, device="meta").stride()
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        arguments = (_Storage(), 0, self._shape, strides, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, elements: int) -> None:
        super().__init__(file, protocol=2)
        self._id = ("storage", _STORAGES[dtype], "0", "cpu", elements)

    def persistent_id(self, obj: object) -> Any:
        return self._id if isinstance(obj, _Storage) else None
