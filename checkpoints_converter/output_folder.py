"""A model folder that appears whole: written beside its place, and exchanged at the end."""

import fnmatch
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.safetensors_files import CHECKSUMS_FILE
from megatron_hybrid.claim import CLAIM_FILE, claimed
from megatron_hybrid.fileio import replace_folder, restore_folder
from megatron_hybrid.json_text import parse_json

# What a model folder is made of; --force removes nothing else.
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "checksums.json", "tokenizer*", "null_tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "README.md", ".*.part",
)  # fmt: skip
CARRIED_NAMES = "carried"  # in checksums.json: what else an export has written, by path


@contextmanager
def output_folder(path: Path, *, force: bool, in_place: bool) -> Iterator[Path]:
    """The folder to write into; at the end of the block it is at `path`, whole.

    An error or Ctrl-C in the block removes what was written. Killed, it leaves `.NAME.part`, which
    the next conversion to the same place removes. One rename puts it in the place of an older one
    (see `fileio.replace_folder`). Another process that writes there is refused meanwhile.

    Args:
        force: replace a model folder that is there.
        in_place: write at `path` itself, file after file, for a process that takes them away while
            they come. What is written there in the end makes it a model.

    Raises:
        ConversionError: something is at `path`, and `force` does not replace it.
    """
    path = path.absolute()  # `.` has no name
    if path.is_symlink():
        raise ConversionError(f"{path} is a symbolic link; give the folder that it should lead to")
    _refuse_to_replace(path, force)
    with claimed([path.with_name(f".{path.name}{CLAIM_FILE}")], "to-hf"):
        restore_folder(path)
        _refuse_to_replace(path, force)  # what another one has written meanwhile
        partial = path if in_place else path.with_name(f".{path.name}.part")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            if not in_place:
                replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _refuse_to_replace(path: Path, force: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise ConversionError(f"{path} exists; give another place, or --force to replace it")
    if not path.is_dir():
        raise ConversionError(f"{path} is not a folder, and --force replaces only model folders")
    written = _carried_names(path)
    names = (
        entry.relative_to(path).as_posix()
        for entry in path.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or not any(entry.iterdir())
    )
    foreign = sorted(
        name
        for name in names
        if name not in written
        and ("/" in name or not any(fnmatch.fnmatch(name, p) for p in MODEL_FILES))
    )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConversionError(
            f"{path} also holds {', '.join(foreign[:3])}{more}, which no conversion wrote; "
            "--force replaces only model folders"
        )


def _carried_names(path: Path) -> set[str]:
    """What an export says that it took over from the model's source; nothing if it is damaged."""
    try:
        return set(map(str, parse_json((path / CHECKSUMS_FILE).read_bytes())[CARRIED_NAMES]))
    except (OSError, ValueError, KeyError, TypeError):
        return set()
