"""The manifest of a checkpoint, `integrity.json`: SHA-256 of every file, in megatron-core's format.

Its presence alone decides whether it is compared. Where it is missing, whoever says that it was
written decides whether that is an error.
"""

import hashlib
import json
from pathlib import Path

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.threads import in_threads
from megatron_hybrid.config import RunConfig
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.small_files import naming, read_json

INTEGRITY_FILE = "integrity.json"
FORMAT_FILE = "metadata.json"
_LOOKED_AT = 1 << 16  # bytes at either end of a file
# Of megatron-core's CheckpointingConfig.
_FORMAT_FIELDS = (
    "sharded_backend", "sharded_backend_version", "common_backend", "common_backend_version",
)  # fmt: skip
# Endings of what is read of a checkpoint; anything else that was put beside it harms nobody.
_READ = (".distcp", ".metadata", ".json", ".pt", ".yaml", ".model")


def write_integrity(folder: Path, threads: int) -> None:
    """Write the manifest of a checkpoint; megatron-core's own takes the files one by one."""
    names = sorted(_files(folder))
    digests = _digests(folder, names, threads)
    manifest = {"algorithm": "sha256", "files": {name: digests[name] for name in names}}
    write_atomic(folder / INTEGRITY_FILE, json.dumps(manifest, indent=2))


def verify_integrity(folder: Path, saved: RunConfig | None, threads: int) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        saved: the config in the checkpoint; None: it has none, as Megatron-LM's own.

    Raises:
        CheckpointError: a file is another, or missing, or is not in the manifest; the manifest is
            damaged; or it is missing, and the config says that it was written.
    """
    path = folder / INTEGRITY_FILE
    if not path.exists():
        if saved is not None and saved.checkpoint.verify_integrity:
            raise CheckpointError(
                f"{folder}: {INTEGRITY_FILE} is missing, which the run wrote; "
                "checkpoint.verify_integrity=false loads the checkpoint unchecked, or for a "
                "conversion --no-verify-integrity"
            )
        return
    manifest = read_json(path, CheckpointError, fields=("algorithm", "files"))
    with naming(path, CheckpointError):
        if manifest.get("algorithm", "sha256") != "sha256":
            raise ValueError(f"algorithm {manifest['algorithm']!r}; allowed: 'sha256'")
        expected = {str(name): str(digest) for name, digest in manifest["files"].items()}
        if outside := [n for n in expected if Path(n).is_absolute() or ".." in Path(n).parts]:
            raise ValueError(f"it names {outside[0]!r}, which is not in the folder")
    present = _files(folder)
    found = _digests(folder, sorted(present & expected.keys()), threads)
    problems = [f"{name}: missing" for name in sorted(expected.keys() - present)]
    foreign = sorted(name for name in present - expected.keys() if name.endswith(_READ))
    problems += [f"{name}: not in {INTEGRITY_FILE}" for name in foreign]
    problems += [
        f"{name}: hash mismatch (expected {expected[name][:16]}, got {digest[:16]})"
        for name, digest in sorted(found.items())
        if digest != expected[name]
    ]
    if problems:
        shown = [*problems[:5], f"and {len(problems) - 5} more"] if problems[5:] else problems
        text = "".join(f"\n  - {problem}" for problem in shown)
        raise CheckpointError(f"{folder} is not as it was written ({INTEGRITY_FILE}):{text}")


def checkpoint_digest(folder: Path) -> str:
    """Tells a checkpoint from others that take its place, by how all its files begin and end."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with naming(path), path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode() + file.read(_LOOKED_AT))
            file.seek(max(0, size - _LOOKED_AT))
            digest.update(file.read(_LOOKED_AT))
    return digest.hexdigest()


def refuse_other_format(folder: Path) -> None:
    """Refuse a checkpoint of another format, or whose file that says so is damaged.

    Raises:
        CheckpointError: naming the file.
    """
    path = folder / FORMAT_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing: {folder} is not a whole checkpoint")
    content = read_json(path, CheckpointError, fields=_FORMAT_FIELDS)
    if content.get("sharded_backend") != "torch_dist":
        raise CheckpointError(
            f"{path}: sharded_backend={content.get('sharded_backend')!r}; allowed: 'torch_dist'"
        )


def _files(folder: Path) -> set[str]:
    """All files under a checkpoint, by their path there, but for the manifest."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths} - {INTEGRITY_FILE}


def _digests(folder: Path, names: list[str], threads: int) -> dict[str, str]:
    digests: dict[str, str] = {}

    def digest(name: str, _: int) -> None:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()

    in_threads(names, digest, threads)
    return digests
