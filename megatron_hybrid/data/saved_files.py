"""The files of a run in megatron-core's order as they travel in a checkpoint: `data_files.json`.

A plan has digests of its own; this order has no plan, and a file that was replaced under its path
would give other samples for the same numbers.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import indexed_paths
from megatron_hybrid.data.shard import Shard
from megatron_hybrid.small_files import naming, read_json

DATA_FILES_FILE = "data_files.json"


def file_digests(shards: Iterable[Shard]) -> dict[str, str]:
    """By prefix, a digest of a file's size and contents, and of its whole index, by which this
    order goes.

    Raises:
        DataError: an index cannot be read.
    """
    return {
        str(shard.prefix): hashlib.sha256(f"{shard.digest} {_index(shard)}".encode()).hexdigest()
        for shard in shards
    }


def _index(shard: Shard) -> str:
    if shard.facts is not None:
        return shard.facts.idx.sha256
    path = indexed_paths(shard.prefix)[1]
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def files_json(digests: Mapping[str, str]) -> str:
    """The content of the file."""
    return json.dumps({"files": dict(digests)}, indent=1)


def read_saved_files(checkpoint: Path) -> dict[str, str]:
    """The digests in a checkpoint's folder; none where it has a plan, or from before there were
    any.

    Raises:
        DataError: the file is damaged.
    """
    path = checkpoint / DATA_FILES_FILE
    if not path.exists():
        return {}
    content = read_json(path, DataError, fields=("files",))["files"]
    with naming(path, DataError):
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise ValueError("files must be an object of texts")
        return content
