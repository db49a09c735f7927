"""The quickstart's corpus: real, whole, made once."""

import os
import runpy
import subprocess
from pathlib import Path

import numpy as np

from megatron_hybrid.data.indexed import open_indexed
from megatron_hybrid.data.tokenizer import build_tokenizer
from tests.warm import python

SCRIPT = Path(__file__).parents[2] / "examples" / "01_quickstart" / "prepare.py"


def prepare(folder: Path) -> str:
    command = [python(), SCRIPT, folder]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_prepare(tmp_path: Path) -> None:
    """It makes text that reads back, does nothing twice, and notices a damaged file."""
    folder = tmp_path / "quickstart"
    assert "tokens" in prepare(folder)
    tokenizer = build_tokenizer("sentencepiece", folder / "tokenizer.model")
    assert tokenizer.vocab_size == 4096
    for source, least_documents, least_tokens in (
        ("code", 100, 1_000_000), ("docs", 100, 100_000), ("reference", 50, 50_000),
    ):  # fmt: skip
        lengths = open_indexed(folder / source).document_lengths
        tokens = np.fromfile(folder / f"{source}.bin", dtype=np.uint16)
        assert len(lengths) > least_documents and len(tokens) > least_tokens
        assert (tokens == tokenizer.eod).sum() == len(lengths)
    first = tokens[: lengths[0] - 1].tolist()
    assert tokenizer.encode(tokenizer.decode(first)) == first
    assert "nothing to do" in prepare(folder)
    os.truncate(folder / "docs.bin", 1000)
    assert not runpy.run_path(str(SCRIPT))["is_whole"](folder)
