"""A tokenizer that encodes fast."""

from pathlib import Path

import pytest

from tests.data.tokenizer_files import FAST_KINDS, save_kind


@pytest.fixture(scope="session")
def fast_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a byte-level BPE tokenizer with `</s>` as its end token."""
    return save_kind(FAST_KINDS["gpt2"](), tmp_path_factory.mktemp("bpe"))
