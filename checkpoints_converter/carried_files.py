"""What of a Hugging Face folder is neither weights nor config: into a checkpoint, and out of it."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.loading_order import is_weights
from checkpoints_converter.safetensors_files import CHECKSUMS_FILE
from megatron_hybrid.checkpoint.carried import Carried
from megatron_hybrid.json_text import parse_json

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
# An export has a card of its own; that of the model it was made from lies beside it.
SOURCE_CARD = "source_README.md"
# Of a file, and of all together: every checkpoint has a copy, and every rank reads it.
_MOST_BYTES, _MOST_BYTES_TOGETHER = 64 << 20, 256 << 20


def carried_from(source: Path, elsewhere: Collection[str]) -> tuple[dict[str, bytes], list[str]]:
    """The files that a checkpoint carries of a folder, and what of it is lost, with the reason.

    config.json is among them for what it says of tokens; the model is read from it, and written
    anew.

    Args:
        elsewhere: names that the checkpoint has already: those of its tokenizer.

    Raises:
        ConversionError: generation_config.json is damaged.
    """
    taken: dict[str, bytes] = {}
    lost = []
    left = _MOST_BYTES_TOGETHER
    for path in _paths(source):
        name = path.relative_to(source).as_posix()
        if name in elsewhere or name == CHECKSUMS_FILE:
            continue
        if path.is_dir():
            lost.append(f"{name}/ (a hidden folder, or a link to one)")
        elif not path.is_file():
            lost.append(f"{name} (no file)")
        elif is_weights(path.name):
            lost += [f"{name} (weights)"] if "/" in name else []  # `passed_over` knows the others
        elif path.stat().st_size > _MOST_BYTES:
            lost.append(f"{name} (larger than {_MOST_BYTES >> 20} MiB)")
        elif path.stat().st_size > left:
            lost.append(f"{name} (with the others, more than {_MOST_BYTES_TOGETHER >> 20} MiB)")
        else:
            taken[name] = path.read_bytes()
            left -= len(taken[name])
    if GENERATION in taken and _object(taken[GENERATION]) is None:
        raise ConversionError(f"{source / GENERATION} is damaged: it must be a JSON object")
    if SOURCE_CARD in taken:  # the card beside it is the one that an export made
        taken.pop(CARD, None)
    elif CARD in taken:
        taken[SOURCE_CARD] = taken.pop(CARD)
    return taken, lost


def _paths(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it; hidden folders, and links to some, are not entered."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _paths(path)
        else:
            yield path


def source_config(carried: Carried) -> dict[str, Any]:
    """The config.json that the model came with; {} where it came with none."""
    return _object(carried.get(CONFIG, b"{}")) or {}


def generation_config(carried: Carried, ids: Mapping[str, Any]) -> bytes:
    """generation_config.json: the source's own, or one that says the ids of tokens.

    One that does not say where a text ends is told so.
    """
    own = carried.get(GENERATION)
    if own is None:
        return _text({"_from_model_config": True, **ids})
    values = _object(own) or {}
    if values.get("eos_token_id") is not None or ids.get("eos_token_id") is None:
        return own
    return _text(values | {"eos_token_id": ids["eos_token_id"]})


def token_ids(carried: Carried, own: Mapping[str, int | None]) -> dict[str, Any]:
    """Ids of special tokens as config.json has them: the source's, else those of the tokenizer."""
    said = source_config(carried)
    return {name: own[name] if said.get(name) is None else said[name] for name in own}


def as_they_were(carried: Carried) -> dict[str, bytes]:
    """The files that an export takes over unchanged."""
    return {name: content for name, content in carried.items() if name not in (CONFIG, GENERATION)}


def _object(content: bytes) -> dict[str, Any] | None:
    """A JSON object; None of anything else."""
    try:
        found = parse_json(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
