"""Indexed files: written as the engine writes them, with facts, and refused when damaged."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.data import indexed
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import facts_path, read_facts
from megatron_hybrid.data.indexed import IndexedFileWriter, indexed_paths, open_indexed
from tests.data.conftest import write_corpus


def pair(prefix: Path) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in indexed_paths(prefix))


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize("vocab_size", [65_499, 65_500])
def test_bytes_equal_the_engines(
    tmp_path: Path, vocab_size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our writer equals IndexedDatasetBuilder on both sides of the change of dtype."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr(indexed, "_INDEX_BLOCK", block)
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab_size, n) for n in (1, 7, 1000, 1, 50, 2)]
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    write_corpus(tmp_path / "b", documents, vocab_size)
    assert pair(tmp_path / "a") == pair(tmp_path / "b")


def test_pair_without_facts_removes_older_ones(tmp_path: Path) -> None:
    """Facts never stay beside a pair that they do not describe."""
    facts_path(tmp_path / "a").write_text("of an older pair")
    write_corpus(tmp_path / "a", [[1, 2]])
    assert read_facts(tmp_path / "a") is None


def test_no_place_to_write(tmp_path: Path) -> None:
    """A folder that is gone is one clear error."""
    with pytest.raises(DataError, match=r"cannot write .*/no/a: No such file or directory"):
        IndexedFileWriter(tmp_path / "no" / "a", 100)


def test_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    """Two writers of one prefix cannot be at work; prefixes that only begin alike can."""
    first = IndexedFileWriter(tmp_path / "a", 100)
    with pytest.raises(DataError, match="another process is writing"):
        IndexedFileWriter(tmp_path / "a", 100)
    IndexedFileWriter(tmp_path / "a.b", 100).discard()
    first.discard()
    IndexedFileWriter(tmp_path / "a", 100).discard()
    assert list(tmp_path.iterdir()) == []


def test_damaged_pairs_do_not_open(tmp_path: Path) -> None:
    """A cut or mixed pair is refused by name instead of read as garbage."""
    prefix = tmp_path / "a"
    write_corpus(prefix, [[1, 2, 3], [4, 5]])
    bin_path, idx_path = indexed_paths(prefix)
    whole = pair(prefix)
    os.truncate(bin_path, 4)
    with pytest.raises(DataError, match=r"a\.bin has 4 bytes; a\.idx describes 10"):
        open_indexed(prefix)
    bin_path.write_bytes(whole[0])
    os.truncate(idx_path, 40)
    with pytest.raises(DataError, match=r"a\.idx has 40 bytes; its header promises 82"):
        open_indexed(prefix)
    idx_path.write_bytes(b"PK" + whole[1])
    with pytest.raises(DataError, match="not an index of Megatron's format"):
        open_indexed(prefix)
