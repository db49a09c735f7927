"""The files to tokenise: found by name or glob, told apart by content, watched for change."""

import glob
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing import zstd_frames
from megatron_hybrid.fileio import matches

Format = Literal["jsonl", "gzip", "zstd", "parquet"]

ALLOWED = "JSONL, JSONL in gzip or zstd, parquet"
_MAGICS: dict[bytes, Format] = {
    b"\x1f\x8b": "gzip",
    **dict.fromkeys((zstd_frames.MAGIC, *zstd_frames.SKIPPABLE_MAGICS), "zstd"),
    b"PAR1": "parquet",
}
_ENDINGS: dict[str, Format] = {".gz": "gzip", ".zst": "zstd", ".parquet": "parquet"}
_REFUSED_MAGICS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_REFUSED_ENDINGS = (".tar", ".tgz", ".tar.gz", ".tar.zst")


@dataclass(frozen=True)
class Input:
    """One file.

    Attributes:
        bytes: its size on disk.
        version: device, inode, size and time of change when it was found.
    """

    path: Path
    format: Format
    bytes: int
    version: tuple[int, int, int, int]


def find_inputs(patterns: Sequence[str], keys: Sequence[str]) -> tuple[list[Input], list[str]]:
    """The files of names and globs, in the order given, each glob's sorted; and the problems.

    Args:
        patterns: file names, and globs where no file has that very name.
        keys: the columns that a parquet file must have.
    """
    inputs: list[Input] = []
    problems: list[str] = []
    seen: set[tuple[int, int]] = set()
    if not patterns:
        problems.append("--input must name a file")
    for pattern in map(os.path.expanduser, patterns):  # the shell leaves --input=~/x as it is
        names = [pattern]
        if not os.path.lexists(pattern) and glob.has_magic(pattern):
            names = [name for name in matches(pattern, recursive=True) if not Path(name).is_dir()]
            if not names:
                problems.append(f"--input {pattern} matches no file")
        for name in names:
            try:
                found = _examine(Path(name), keys)
            except DataError as error:
                problems.append(str(error))
                continue
            if found.version[:2] in seen:
                problems.append(f"--input {name} is named twice: its documents would repeat")
            seen.add(found.version[:2])
            inputs.append(found)
    return inputs, problems


def check_unchanged(inputs: Sequence[Input]) -> None:
    """Raise DataError if a file is not the one that was found, byte for byte as far as one sees."""
    for item in inputs:
        with reading(item.path):
            if _version(item.path.stat()) != item.version:
                raise DataError(
                    f"--input {item.path} changed while it was read; nothing was published"
                )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a file system or a decompressor raises into a DataError that names the file."""
    try:
        yield
    except EOFError as error:
        raise DataError(f"--input {path} is cut short: {error}; nothing was published") from error
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"--input {path} cannot be read: {reason}; nothing was published"
        ) from error


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """As `reading`, for a parquet file."""
    import pyarrow as pa

    try:
        with reading(path):
            yield
    except pa.ArrowException as error:
        raise DataError(
            f"--input {path} is a damaged parquet file: {error}; nothing was published"
        ) from error


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _examine(path: Path, keys: Sequence[str]) -> Input:
    if path.is_dir():
        raise DataError(f"--input {path} is a folder; name its files, as in '{path}/*.jsonl'")
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"--input {path} is not a regular file")
        with path.open("rb") as file:
            start = file.read(16)
    kind = _format(path, start)
    if kind == "zstd":
        _check_window(path)
    if kind == "parquet":
        _check_columns(path, keys)
    return Input(path, kind, status.st_size, _version(status))


def _format(path: Path, start: bytes) -> Format:
    for magic, name in _REFUSED_MAGICS.items():
        if start.startswith(magic):
            raise DataError(f"--input {path} is {name}; allowed: {ALLOWED}")
    if path.name.endswith(_REFUSED_ENDINGS):
        raise DataError(f"--input {path} is an archive; allowed: {ALLOWED}")
    kinds: list[Format] = [kind for magic, kind in _MAGICS.items() if start.startswith(magic)]
    kind = kinds[0] if kinds else "jsonl"
    named = _ENDINGS.get(path.suffix, kind)
    if named != kind:
        found = "is empty" if not start else f"begins like {kind}"
        raise DataError(f"--input {path} {found}, but its name says {named}")
    return kind


def _check_window(path: Path) -> None:
    with reading(path), path.open("rb") as file:
        window = zstd_frames.window_bytes(file)
    if window > zstd_frames.MAX_WINDOW_BYTES:
        raise DataError(
            f"--input {path} has a zstd window of {window >> 20} MiB; allowed: up to "
            f"{zstd_frames.MAX_WINDOW_BYTES >> 20}, as of `zstd -dc --long=31 {path.name} | zstd`"
        )


def _check_columns(path: Path, keys: Sequence[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with reading_parquet(path):
        schema = parquet.read_schema(path)
    for key in keys:
        columns = [field for field in schema if field.name == key]
        if len(columns) != 1:
            count = "no column" if not columns else f"{len(columns)} columns"
            raise DataError(
                f"--json-key {key}: --input {path} has {count} of that name; "
                f"its columns: {', '.join(schema.names)}"
            )
        kind = columns[0].type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise DataError(f"--json-key {key}: --input {path} has {kind} there, not strings")
