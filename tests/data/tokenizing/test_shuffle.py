"""The random order: a function of the seed alone, whatever the memory and the processes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hybrid.data.tokenizing import shuffle, tokenize
from megatron_hybrid.data.tokenizing.shuffle import DocumentShuffler, document_keys
from tests.data.tokenizing.samples import contents, documents, leftovers, settings_in, write_lines


def shuffled(
    folder: Path, texts: list[list[int]], cuts: list[int], seed: int, memory_bytes: int
) -> list[list[int]]:
    """The documents in the shuffler's order, handed over in chunks that end at `cuts`."""
    shuffler = DocumentShuffler(folder / "runs", 2, seed, memory_bytes)
    for part in np.split(np.arange(len(texts)), sorted(cut % (len(texts) + 1) for cut in cuts)):
        chunk = [texts[index] for index in part]
        tokens = b"".join(np.array(text, "<u2").tobytes() for text in chunk)
        shuffler.add_documents(tokens, np.array([len(text) for text in chunk], np.int32))
    result = []
    for tokens, lengths in shuffler.documents():
        ids = np.frombuffer(tokens, "<u2")
        result += [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]
    shuffler.discard()
    assert not (folder / "runs").exists()
    return result


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    seed=st.integers(-(2**70), 2**70),
    memory_bytes=st.one_of(st.integers(1, 3000), st.just(1 << 20)),
)
def test_order_is_that_of_the_keys(
    tmp_path: Path, lengths: list[int], cuts: list[int], seed: int, memory_bytes: int
) -> None:
    """Any documents, chunks, memory: all documents, once each, sorted by their keys."""
    texts = [[index] * length for index, length in enumerate(lengths)]
    keys = document_keys(seed, 0, len(texts))
    expected = [texts[index] for index in np.argsort(keys)]
    assert shuffled(tmp_path, texts, cuts, seed, memory_bytes) == expected


def test_many_runs_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory of a thirtieth of the tokens: many runs, ranges and blocks, and the same order."""
    monkeypatch.setattr(shuffle, "_BLOCK_BYTES", 256)
    draw = np.random.default_rng(0)
    texts = [[index % 65_536] * int(n) for index, n in enumerate(draw.integers(1, 40, 1000))]
    size = 2 * sum(map(len, texts))
    cuts = list(range(0, 1000, 7))
    assert shuffled(tmp_path, texts, cuts, 3, size // 30) == shuffled(tmp_path, texts, [], 3, size)


def test_keys() -> None:
    """Distinct, the same however they are asked for, another order for another seed, and random."""
    keys = document_keys(1, 0, 100_000)
    assert len(np.unique(keys)) == len(keys)
    assert np.array_equal(keys[40_000:40_010], document_keys(1, 40_000, 10))
    order, other = np.argsort(keys), np.argsort(document_keys(2, 0, 100_000))
    positions = np.arange(len(keys))
    for permutation in (order, other, np.argsort(order)[other]):
        # Of a random order: correlation within 4 standard deviations; neighbours kept about twice.
        assert abs(np.corrcoef(positions, permutation)[0, 1]) < 4 / np.sqrt(len(keys))
        assert np.sum(np.abs(np.diff(permutation)) == 1) < 14
        # Where the documents of each tenth of the input go: chi-square with 81 degrees of freedom.
        table = np.zeros((10, 10))
        np.add.at(table, (positions * 10 // len(keys), permutation * 10 // len(keys)), 1)
        assert np.sum((table - 1000) ** 2) / 1000 < 140


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_depends_on_memory_or_workers(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's three files are the same bytes in memory and through runs on disk."""
    monkeypatch.setattr("megatron_hybrid.data.tokenizing.chunks.CHUNK_BYTES", 1000)
    texts = [[n % 900] * (n % 50 + 1) for n in range(400)]
    write_lines(tmp_path / "in.jsonl", texts)
    results = []
    for memory_bytes in (1 << 20, 5000, 1):
        tokenize(
            settings_in(
                tmp_path, shuffle_seed=5, shuffle_memory_bytes=memory_bytes, workers=workers
            )
        )
        results.append(contents(tmp_path / "out"))
    assert results[0] == results[1] == results[2]
    found = documents(tmp_path / "out")
    assert found == [texts[index] for index in np.argsort(document_keys(5, 0, len(texts)))]
    assert found != texts
    assert Counter(map(tuple, found)) == Counter(map(tuple, texts))
    assert leftovers(tmp_path) == []


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The shuffler's buffer stays as large as it was asked to be, and so do the ranges it reads."""
    shuffler = DocumentShuffler(tmp_path / "runs", 2, 0, 1 << 20)
    chunk = np.zeros(50_000, "<u2").tobytes()
    for _ in range(200):  # 20 MB
        shuffler.add_documents(chunk, np.full(500, 100, np.int32))
    total = 0
    for tokens, _ in shuffler.documents():
        assert len(tokens) <= 1 << 20
        assert len(shuffler._buffer) == 1 << 20
        total += len(tokens)
    assert total == 200 * len(chunk)
    shuffler.discard()
