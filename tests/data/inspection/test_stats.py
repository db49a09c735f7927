"""`data stats`: exact figures over any number of blocks and files, and a picture."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.inspection.lengths import Lengths
from megatron_hybrid.data.inspection.stats import read_lengths
from tests.data.conftest import write_corpus

LENGTH = st.one_of(st.integers(0, 50), st.integers(0, 3_000_000))  # beyond what is counted singly


@given(blocks=st.lists(st.lists(LENGTH, max_size=30), max_size=5), fraction=st.floats(0, 1))
def test_lengths(blocks: list[list[int]], fraction: float) -> None:
    """Sums, quantiles and bins are numpy's of all lengths at once, however they came in."""
    lengths, merged = Lengths(), Lengths()
    for number, block in enumerate(blocks):
        part = Lengths()
        part.add(np.array(block, np.int32))
        merged.merge(part)
        (lengths if number % 2 else part).add(np.empty(0, np.int32))
        lengths.add(np.array(block, np.int32))
    every = np.array([length for block in blocks for length in block], np.int64)
    if not len(every):
        assert lengths.documents == lengths.tokens == 0
        return
    edges = np.array([0, 1, 7, 30, 1000, 1 << 20, 4_000_000])
    for found in (lengths, merged):
        assert (found.documents, found.tokens) == (len(every), every.sum())
        assert found.mean == pytest.approx(every.mean())
        assert found.quantile(fraction) == np.quantile(every, fraction, method="inverted_cdf")
        documents, tokens = found.histogram(edges)
        assert documents.tolist() == np.histogram(every, edges)[0].tolist()
        assert tokens.tolist() == np.histogram(every, edges, weights=every)[0].tolist()


def test_files_and_their_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file has its figures, and all together theirs; the index may have many blocks."""
    monkeypatch.setattr("megatron_hybrid.data.index._BLOCK", 3)
    counts = {"a": [5, 1, 3, 3, 8, 2, 2], "b": [40]}
    for name, lengths in counts.items():
        write_corpus(tmp_path / name, [[7] * length for length in lengths])
    found = read_lengths([tmp_path / "a", tmp_path / "b"])
    assert list(found) == [f"{tmp_path}/a", f"{tmp_path}/b", "all"]
    assert [(each.documents, each.tokens) for each in found.values()] == [(7, 24), (1, 40), (8, 64)]
    assert found[f"{tmp_path}/a"].quantile(0.5) == 3
    assert found["all"].quantile(1.0) == 40


def test_problems_at_once(tmp_path: Path) -> None:
    """All files that cannot be counted are named, also those whose index is damaged inside."""
    write_corpus(tmp_path / "none", [])
    prefix = tmp_path / "damaged"
    write_corpus(prefix, [[1, 2], [3, 4], [5]])
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[34:38] = np.int32(-2).tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_lengths([tmp_path / "none", prefix, tmp_path / "gone"])
    assert str(error.value).splitlines() == [
        f"{tmp_path}/none.idx describes no document",
        f"{prefix}.idx is damaged: a document has -2 tokens; `megatron-hybrid data verify` says "
        "where",
        f"cannot read {tmp_path}/gone.idx: No such file or directory",
    ]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_command(count: int, tmp_path: Path) -> None:
    """The table has a row for each file and one for all; the picture is a PNG of useful size."""
    for number in range(count):
        documents = [[1] * (number + 4 * length) for length in range(30)]
        write_corpus(tmp_path / f"shard{number:02d}", documents)
    output = tmp_path / "pictures" / "lengths.png"
    names = [f"{tmp_path}/shard*", "-o", str(output)]
    result = CliRunner().invoke(app, ["data", "stats", *names])
    assert result.exit_code == 0, result.output
    rows = [line.split("│") for line in result.stdout.splitlines() if "│" in line]
    assert len(rows) == (1 if count == 1 else count + 1)
    assert rows[0][2].strip() == "30"
    assert rows[-1][2].strip() == str(30 * count)
    assert rows[0][3].strip() == f"{4 * sum(range(30)):,}"
    assert f"picture: {output}" in result.stdout
    content = output.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    """A picture's path that is none is an error with a reason; the figures have been printed."""
    write_corpus(tmp_path / "a", [[1, 2]])
    output = tmp_path / "a.bin" / "picture.png"
    result = CliRunner().invoke(app, ["data", "stats", str(tmp_path / "a"), "-o", str(output)])
    assert str(result.exception) == f"cannot write {output}: File exists; there is no picture"
    assert "longest" in result.stdout
