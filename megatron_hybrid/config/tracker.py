"""Which checkpoint of a folder is the latest, in Megatron-LM's layout, without opening any."""

from pathlib import Path

from megatron_hybrid.fileio import refusal

TRACKER_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
FIRST_FOLDER = "iter_0000000"  # no run has trained yet: it was imported, or made from an import


def latest_folder(checkpoints: Path) -> Path:
    """The folder of the latest whole checkpoint, such as `iter_0000100`.

    Raises:
        ValueError: the tracker file does not hold the number of an iteration.
        OSError: it cannot be read.
    """
    text = (checkpoints / TRACKER_FILE).read_text(encoding="utf-8", errors="replace").strip()
    if not text.isascii() or not text.isdigit():
        raise ValueError(
            f"{TRACKER_FILE} holds {text[:40]!r}; it must be the number of an iteration"
        )
    return checkpoints / f"iter_{int(text):07d}"


def load_problems(checkpoints: Path, field: str = "checkpoint.load") -> list[str]:
    """Why no checkpoint can be loaded from a folder that a field names; nothing where one can."""
    name = f"{field}={checkpoints}"
    try:
        return _load_problems(checkpoints, name)
    except OSError as error:
        return [f"{name} cannot be looked at: {refusal(error) or error}"]


def _load_problems(checkpoints: Path, name: str) -> list[str]:
    if not checkpoints.is_dir():
        return [f"{name}: no such folder"]
    if not (checkpoints / TRACKER_FILE).is_file():
        inner = checkpoints / "checkpoints"
        hint = f"; did you mean {inner}?" if (inner / TRACKER_FILE).is_file() else ""
        found = sorted(path.name for path in checkpoints.glob("iter_*") if path.is_dir())
        if found:
            return [
                f"{name} holds {', '.join(found[-3:])}, and no {TRACKER_FILE} that says which is "
                "the latest: write its number there"
            ]
        return [f"{name} holds no {TRACKER_FILE}: it is no folder of checkpoints{hint}"]
    try:
        folder = latest_folder(checkpoints)
    except ValueError as error:
        return [f"{name}: {error}"]
    return (
        [] if folder.is_dir() else [f"{name}: {TRACKER_FILE} names {folder.name}: no such folder"]
    )
