"""What a checkpoint carries of the Hugging Face folder that its model came from.

    iter_0000000/hugging_face/chat_template.jinja, generation_config.json, LICENSE, config.json, …

The trainer has no use for any of it; it goes from checkpoint to checkpoint, so that an export of
the trained model has it again.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_hybrid.fileio import write_atomic

FOLDER = "hugging_face"
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


def holds_tokenizer_files(carried: Carried) -> bool:
    """Whether some of it are files of a tokenizer, of a kind that the trainer may not have."""
    return any(Path(name).name.startswith(_OF_TOKENIZERS) for name in carried)


def write_carried(checkpoint: Path, carried: Carried) -> None:
    """Write what `read_carried` gives again."""
    write_files(checkpoint / FOLDER, carried)


def write_files(folder: Path, files: Carried) -> None:
    """Write files by their path below a folder, which is made where there are any."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
