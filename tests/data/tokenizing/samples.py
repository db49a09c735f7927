"""What the tests of tokenising share: settings in a folder, and what was published there."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data.facts import Facts, facts_path, read_facts
from megatron_hybrid.data.indexed import indexed_paths, open_indexed
from megatron_hybrid.data.tokenizing import TokenizeSettings

VOCAB_SIZE = 1000
EOD = VOCAB_SIZE - 1


def settings_in(folder: Path, *inputs: Path | str, **changes: Any) -> TokenizeSettings:
    """Settings of a tokenizer whose text is ids; writes `folder/out.*`, in the input's order."""
    defaults = {
        "inputs": tuple(map(str, inputs)) or (str(folder / "in.jsonl"),),
        "outputs": {"text": folder / "out"},
        "rejected_path": folder / "out_rejected.jsonl",
        "tokenizer_type": "null",
        "tokenizer_model": None,
        "vocab_size": VOCAB_SIZE,
        "append_eod": False,
        "max_rejected_fraction": 0.9,
    }
    return TokenizeSettings(**(defaults | changes))


def write_lines(path: Path, lines: Sequence[bytes | str | list[int]]) -> Path:
    """A JSONL file; a list of ids stands for the document of those ids."""

    def line(content: bytes | str | list[int]) -> bytes:
        if isinstance(content, list):
            return json.dumps({"text": " ".join(map(str, content))}).encode()
        return content.encode() if isinstance(content, str) else content

    path.write_bytes(b"".join(line(content) + b"\n" for content in lines))
    return path


def documents(prefix: Path) -> list[list[int]]:
    """The ids of each document of a pair, which must be whole and agree with its facts."""
    facts = read_facts(prefix)
    assert facts is not None
    check_sums(prefix, facts)
    lengths = open_indexed(prefix).document_lengths
    ids = np.fromfile(f"{prefix}.bin", dtype=facts.dtype)
    assert (facts.documents, facts.tokens) == (len(lengths), len(ids))
    assert facts.longest_document_tokens == lengths.max()
    assert facts.highest_token == ids.max()
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def check_sums(prefix: Path, facts: Facts) -> None:
    """The pair is, byte for byte, the one that the facts describe."""
    for path, known in zip(indexed_paths(prefix), (facts.bin, facts.idx), strict=True):
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (known.bytes, known.sha256)


def contents(prefix: Path) -> tuple[bytes, ...]:
    """The bytes of `.bin`, `.idx` and `.meta.json`."""
    return tuple(path.read_bytes() for path in (*indexed_paths(prefix), facts_path(prefix)))


def rejected(settings: TokenizeSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in settings.rejected_path.read_text().splitlines()]


def leftovers(folder: Path) -> list[str]:
    """What a run that ended well leaves nothing of."""
    return sorted(path.name for path in folder.rglob("*.part*"))
