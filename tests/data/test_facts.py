"""The facts beside an indexed pair: written and read back, and refused when damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import (
    Facts,
    FileFacts,
    InputFacts,
    InputFile,
    TokenizerFacts,
    facts_path,
    read_facts,
)

FACTS = Facts(
    bin=FileFacts(8, "a" * 64),
    idx=FileFacts(62, "0" * 64),
    dtype="uint16",
    documents=1,
    tokens=4,
    longest_document_tokens=4,
    highest_token=99,
    tokenizer=TokenizerFacts("null", "f" * 64, 100, 99, True),
    append_eod=True,
    shuffle_seed=None,
    input=InputFacts((InputFile("a b/ü.jsonl", 10), InputFile("c", 0)), 3, 1, 1),
)


def test_round_trip(tmp_path: Path) -> None:
    """What is written is what is read; a prefix may hold dots; without a file there are none."""
    prefix = tmp_path / "web.v1"
    assert read_facts(prefix) is None
    facts_path(prefix).write_text(FACTS.to_json())
    assert facts_path(prefix).name == "web.v1.meta.json"
    assert read_facts(prefix) == FACTS


def without(key: str) -> dict[str, Any]:
    content = json.loads(FACTS.to_json())
    del content[key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FACTS.to_json()[:100], "is damaged: not JSON"),
        (b"\xff\xfe\0", "is damaged: not JSON"),
        ("[]", "is damaged: it must hold a JSON object"),
        ({"format": "safetensors"}, "format must be 'megatron-hybrid tokens'"),
        ({"version": 2}, "has version 2; this program reads 1"),
        (without("tokens"), "is damaged: tokens: Field required"),
        ({"documents": -1}, "is damaged: documents: .* greater than or equal to 0 .found -1."),
        ({"bin": {"bytes": 1, "sha256": "short"}}, "is damaged: bin.sha256: .*found 'short'"),
        ({"dtype": "float32"}, "is damaged: dtype: .*'uint16' or 'int32'"),
    ],
)
def test_damaged(tmp_path: Path, content: Any, message: str) -> None:
    """A file that is not what was written is an error that names the file and the field."""
    if isinstance(content, dict):
        whole = without("tokens") if "tokens" not in content and len(content) > 5 else None
        content = json.dumps(whole or json.loads(FACTS.to_json()) | content)
    path = facts_path(tmp_path / "web")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"web.meta.json.*{message}"):
        read_facts(tmp_path / "web")
