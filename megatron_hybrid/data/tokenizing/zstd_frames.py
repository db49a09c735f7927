"""How a zstd file begins (RFC 8878): skippable frames, and the window of the first other one."""

import os
import struct
from typing import IO

MAGIC = b"\x28\xb5\x2f\xfd"
# Parallel compressors put such frames before the others; a decoder passes over them.
SKIPPABLE_MAGICS = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))
MAX_WINDOW_BYTES = 1 << 27  # what the decoder allocates at most
_CONTENT_SIZE_BYTES = (0, 2, 4, 8)
_DICTIONARY_BYTES = (0, 1, 2, 4)


def window_bytes(file: IO[bytes]) -> int:
    """The memory that the first frame asks of a decoder; 0: there is none, or it is cut short."""
    while (head := file.read(8))[:4] in SKIPPABLE_MAGICS and len(head) == 8:
        file.seek(struct.unpack("<I", head[4:])[0], os.SEEK_CUR)
    header = head[4:] + file.read(16)
    if head[:4] != MAGIC or len(header) < 2:
        return 0
    about = header[0]
    if not about & 0x20:
        base = 1 << (10 + (header[1] >> 3))
        return base + base // 8 * (header[1] & 7)
    # One segment: the window is the content, whose size follows the dictionary's number.
    size = _CONTENT_SIZE_BYTES[about >> 6] or 1
    begin = 1 + _DICTIONARY_BYTES[about & 3]
    return int.from_bytes(header[begin : begin + size], "little") + (256 if size == 2 else 0)
