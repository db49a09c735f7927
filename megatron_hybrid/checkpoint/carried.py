"""What a checkpoint carries of the Hugging Face folder that its model came from.

    iter_0000000/hugging_face/chat_template.jinja, generation_config.json, LICENSE, config.json, …

The trainer has no use for any of it; it goes from checkpoint to checkpoint, so that an export of
the trained model has it again.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_hybrid.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming, read_json

logger = logging.getLogger(__name__)

FOLDER = "hugging_face"
SAY_ENDS = ("generation_config.json", "config.json")  # which tokens end a text; the first that does
Carried = Mapping[str, bytes]  # content by path below the folder
# How the files of tokenizers begin that transformers knows.
_OF_TOKENIZERS = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template",
)  # fmt: skip


def read_carried(checkpoint: Path) -> dict[str, bytes]:
    """What a checkpoint carries; nothing where it came from no Hugging Face folder."""
    folder = checkpoint / FOLDER
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def carried_on(checkpoint: Path, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a checkpoint hands on to those made from it; nothing, which is told, where it is of
    another tokenizer than theirs.
    """
    carried = read_carried(checkpoint)
    if not carried:
        return {}
    if not holds_tokenizer(checkpoint):
        # Of a kind that is none of ours: what is used instead is another.
        if not any(Path(name).name.startswith(_OF_TOKENIZERS) for name in carried):
            return carried
    elif (its := load_tokenizer(checkpoint)).fingerprint == tokenizer.fingerprint:
        # A fingerprint is of the file with the vocabulary, which need not name the end token.
        return carried if its.eod == tokenizer.eod else _ending_too(carried, tokenizer.eod)
    logger.warning(
        "%s is of another tokenizer than the run's; its checkpoints do not carry on: %s",
        checkpoint, ", ".join(carried),
    )  # fmt: skip
    return {}


def carried_ends(folder: Path) -> frozenset[int]:
    """Tokens that end a text by the Hugging Face folder that a model came from, as transformers
    reads it: those of a turn, beside that of a document.

    Args:
        folder: the checkpoint itself.

    Raises:
        UserError: a file of that folder is damaged.
    """
    paths = (folder / FOLDER / name for name in SAY_ENDS)
    return _ends((path, read_json(path)) for path in paths if path.exists())


def ends_of(carried: Carried) -> frozenset[int]:
    """As `carried_ends`, of what a run has of that folder."""

    def content(name: str) -> dict[str, Any]:
        with naming(Path(FOLDER, name)):
            return dict(parse_json(carried[name]))

    return _ends((Path(FOLDER, name), content(name)) for name in SAY_ENDS if name in carried)


def _ends(said: Iterator[tuple[Path, dict[str, Any]]]) -> frozenset[int]:
    for path, content in said:
        found = content.get("eos_token_id")
        if found is None:
            continue
        ends = found if isinstance(found, list) else [found]
        if not all(type(each) is int for each in ends):
            raise UserError(
                f"{path}: eos_token_id={found!r:.100} must be a whole number, or a list of them"
            )
        return frozenset(ends)
    return frozenset()


def _ending_too(carried: Carried, eod: int) -> dict[str, bytes]:
    """The same files, of which those that say what ends a text say one token more."""
    found = dict(carried)
    for name in SAY_ENDS:
        with naming(Path(FOLDER, name)):
            content = dict(parse_json(carried.get(name, b"{}")))
        said = content.get("eos_token_id")
        ends = said if isinstance(said, list) else [said]
        if said is None or eod in ends:
            continue
        found[name] = (
            json.dumps(content | {"eos_token_id": [*ends, eod]}, indent=2).encode() + b"\n"
        )
        logger.warning(
            "note: %s of the model ends texts at %s; from here on also at the end token of "
            "data.tokenizer_model, %s", name, said, eod,
        )  # fmt: skip
    return found


def write_carried(checkpoint: Path, carried: Carried) -> None:
    """Write what `read_carried` gives again."""
    write_files(checkpoint / FOLDER, carried)


def write_files(folder: Path, files: Carried) -> None:
    """Write files by their path below a folder, which is made where there are any."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
