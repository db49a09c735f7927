"""Files that are read at many places, kept open."""

import os
from pathlib import Path
from typing import Any

from megatron_hybrid.data.errors import DataError


class OpenFiles:
    """Descriptors of the files that were read last; the oldest is closed for another one.

    Files are read, not mapped into memory: it is as fast, and a file that is cut short under a run
    is an error with its name, where a mapping would end the process.
    """

    _MOST = 256

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read(self, path: Path, size: int, at: int, out: memoryview) -> None:
        """Fill `out`, of bytes, from byte `at` of a file on.

        Args:
            size: of the file, in bytes, when the run opened it.

        Raises:
            DataError: it cannot be read, or has another size.
        """
        try:
            descriptor = self._descriptor(path, size)
            while out:
                got = os.preadv(descriptor, [out], at)
                if not got:
                    raise DataError(f"{path} was cut short while the run read it")
                out, at = out[got:], at + got
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def _descriptor(self, path: Path, size: int) -> int:
        descriptor = self._descriptors.pop(path, None)
        if descriptor is None:
            if len(self._descriptors) == self._MOST:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(descriptor).st_size != size:
                os.close(descriptor)
                raise DataError(f"{path} has changed since the run opened it")
        self._descriptors[path] = descriptor  # as the last one
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Descriptors mean nothing in another program."""
        return OpenFiles, ()
