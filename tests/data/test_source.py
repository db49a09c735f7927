"""Opening sources by their sizes, refusing what is not whole, and reading across shards."""

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import (
    Facts,
    FileFacts,
    InputFacts,
    TokenizerFacts,
    facts_path,
)
from megatron_hybrid.data.open_files import OpenFiles
from megatron_hybrid.data.shard import open_shard
from megatron_hybrid.data.source import Source, open_sources
from tests.data.conftest import write_corpus

FINGERPRINT = "ab" * 32
INT32_VOCAB = 100_000


def _write(prefix: Path, tokens: int, vocab: int = 1000, first: int = 0) -> np.ndarray:
    """A shard of consecutive ids in documents of 7 tokens; gives the ids."""
    ids = np.arange(first, first + tokens) % vocab
    write_corpus(prefix, [ids[at : at + 7].tolist() for at in range(0, tokens, 7)], vocab)
    return ids


def _add_facts(prefix: Path, **edits: Any) -> None:
    """Facts beside a pair of uint16 ids that `_write` made, true but for the edits."""
    bin_bytes = Path(f"{prefix}.bin").stat().st_size
    documents = -(-bin_bytes // 14)
    facts = Facts(
        bin=FileFacts(bin_bytes, f"{bin_bytes:064x}"),
        idx=FileFacts(Path(f"{prefix}.idx").stat().st_size, "0" * 64),
        dtype="uint16",
        documents=documents,
        tokens=bin_bytes // 2,
        longest_document_tokens=7,
        highest_token=999,
        tokenizer=TokenizerFacts("null", FINGERPRINT, 1000, 999),
        append_eod=True,
        shuffle_seed=None,
        input=InputFacts((), documents, 0, 0),
    )
    content = json.loads(facts.to_json()) | edits
    facts_path(prefix).write_text(json.dumps(content))


def _problems(paths: dict[str, list[Path | str]], fingerprint: str | None = None) -> list[str]:
    with pytest.raises(DataError) as error:
        open_sources(
            {name: [str(path) for path in each] for name, each in paths.items()}, fingerprint
        )
    return str(error.value).splitlines()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, np.ndarray]:
    """A source of four shards of both types of ids, one of them empty; and all its ids."""
    folder = tmp_path_factory.mktemp("mixed")
    parts = [
        _write(folder / "a", 101),
        _write(folder / "b", 3, INT32_VOCAB, first=70_000),
        _write(folder / "c", 0),
        _write(folder / "d.with.dots", 250, INT32_VOCAB, first=99_900),
    ]
    return open_sources({"web": [f"{folder}/*"]})["web"], np.concatenate(parts)


@given(begin=st.integers(0, 354), count=st.integers(0, 354))
def test_reading_goes_across_shards(
    mixed: tuple[Source, np.ndarray], begin: int, count: int
) -> None:
    """Any stretch of tokens is that of the shards end to end, as int64, whatever their types."""
    source, ids = mixed
    count = min(count, source.tokens - begin)
    out = np.full(count, -1, dtype=np.int64)
    source.read(begin, out)
    assert np.array_equal(out, ids[begin : begin + count])


def test_globs_give_sorted_shards_and_paths_may_hold_their_signs(tmp_path: Path) -> None:
    """A glob's shards are read in the order of their names; a prefix with brackets is a prefix."""
    for name in ("w10", "w2", "w1", "x[1]"):
        _write(tmp_path / name, 20)
    sources = open_sources({"web": [f"{tmp_path}/w*"], "x": [f"{tmp_path}/x[1]"]})
    assert [shard.prefix.name for shard in sources["web"].shards] == ["w1", "w10", "w2"]
    assert [shard.prefix.name for shard in sources["x"].shards] == ["x[1]"]


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards are read, only as many as allowed stay open, and all close in the end."""
    monkeypatch.setattr(OpenFiles, "_MOST", 3)
    ids = np.concatenate([_write(tmp_path / f"{number}", 10, first=number) for number in range(8)])
    before = psutil.Process().num_fds()
    source = open_sources({"web": [f"{tmp_path}/*"]})["web"]
    for begin in (0, 35, 0, 70, 5):
        out = np.empty(10, dtype=np.int64)
        source.read(begin, out)
        assert np.array_equal(out, ids[begin : begin + 10])
        assert psutil.Process().num_fds() <= before + 3
    again = pickle.loads(pickle.dumps(source))
    again.read(0, out)
    assert np.array_equal(out, ids[:10])
    del source, again
    assert psutil.Process().num_fds() == before


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    """Missing, cut short, exchanged, of another format or type, matched by nothing."""
    for name in ("short_bin", "short_idx", "swapped", "no_bin", "no_idx", "type", "other"):
        _write(tmp_path / name, 70)
    with (tmp_path / "short_bin.bin").open("r+b") as file:
        file.truncate(60)
    with (tmp_path / "short_idx.idx").open("r+b") as file:
        file.truncate(80)
    _write(tmp_path / "longer", 77)
    shutil.copy(tmp_path / "longer.bin", tmp_path / "swapped.bin")
    (tmp_path / "no_bin.bin").unlink()
    (tmp_path / "no_idx.idx").unlink()
    with (tmp_path / "type.idx").open("r+b") as file:
        file.seek(17)
        file.write(bytes([5]))
    (tmp_path / "other.idx").write_bytes(b"not an index" * 10)
    names = ["short_bin", "short_idx", "swapped", "no_bin", "no_idx", "type", "other"]
    t = tmp_path
    assert _problems({"web": [t / name for name in names], "code": [f"{t}/nothing*"]}) == [
        f"source web: cannot read {t}/no_bin.bin: No such file or directory",
        f"source web: cannot read {t}/no_idx.idx: No such file or directory",
        f"source web: {t}/other.idx is not an index of Megatron's format",
        f"source web: {t}/short_bin.bin has 60 bytes; short_bin.idx describes 140: the two are not "
        "from one run, or one was cut short",
        f"source web: {t}/short_idx.idx has 80 bytes; its header promises 242: it was cut short or "
        "damaged",
        f"source web: {t}/swapped.bin has 154 bytes; swapped.idx describes 140: the two are not "
        "from one run, or one was cut short",
        f"source web: {t}/type.idx has version 1 and dtype code 5; allowed: version 1, dtype codes "
        "[4, 8] (int32, uint16)",
        f"source code: {t}/nothing* matches no token files; it must match prefixes, the paths of "
        "token files without .bin and .idx",
    ]


def test_a_file_may_be_in_one_source_once(tmp_path: Path) -> None:
    """Twice in a source, or in two, by another path or a link: its text would be read twice."""
    _write(tmp_path / "web", 20)
    for end in (".bin", ".idx"):
        (tmp_path / f"link{end}").symlink_to(tmp_path / f"web{end}")
    t = tmp_path
    assert _problems({"web": [t / "web", f"{t}/w*"], "code": [t / "link"]}) == [
        f"source {name}: {t}/{prefix}.bin is a file that source web has already ({t}/web.bin); its "
        "text would be read twice"
        for name, prefix in (("web", "web"), ("code", "link"))
    ]


def test_facts_must_be_of_these_files_and_this_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Facts of other files, damaged ones, or of another tokenizer are refused; a source without
    facts is a line in the log."""
    for name in ("good", "stale", "foreign", "damaged", "bare"):
        _write(tmp_path / name, 70)
    _add_facts(tmp_path / "good")
    _add_facts(tmp_path / "stale", tokens=71, documents=11)
    _add_facts(tmp_path / "foreign")
    facts_path(tmp_path / "damaged").write_text("{")
    t = tmp_path
    problems = _problems({"web": [t / "stale", t / "damaged"]}, FINGERPRINT)
    assert problems[0].startswith(f"source web: {t}/damaged.meta.json is damaged: ")
    assert problems[1:] == [
        f"source web: {t}/stale.meta.json is of other files: documents is 11, the files have 10; "
        "tokens is 71, the files have 70"
    ]
    assert _problems({"a": [t / "good"], "b": [t / "foreign", t / "bare"]}, "cd" * 32) == [
        f"source {source}: {t}/{name} was made with another tokenizer (fingerprint abababababab) "
        "than data.tokenizer_model (cdcdcdcdcdcd)"
        for source, name in (("a", "good"), ("b", "foreign"))
    ]
    paths = {"a": [str(t / "good")], "b": [str(t / "foreign"), str(t / "bare")]}
    open_sources(paths)
    facts = json.loads(facts_path(t / "foreign").read_text())
    facts["tokenizer"]["fingerprint"] = "ef" * 32
    facts_path(t / "foreign").write_text(json.dumps(facts))
    with pytest.raises(DataError) as error:  # whichever the run's is
        open_sources(paths)
    assert str(error.value) == (
        f"source b: {t}/foreign was made with another tokenizer (fingerprint efefefefefef) than "
        f"{t}/good (abababababab)"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_sources({"a": [str(t / "good")], "b": [str(t / "bare")]}, FINGERPRINT)
    assert [record.getMessage() for record in caplog.records] == [
        "source b: 1 of 1 shards have no facts (.meta.json), so that their tokenizer cannot be "
        "checked"
    ]


def test_special_tokens_that_are_ids_in_some_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Within a source that is told: half of its texts would have characters there."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        _write(path, 70)
        _add_facts(path)
    facts = json.loads(facts_path(paths[0]).read_text())
    facts["tokenizer"]["parse_special_tokens"] = True
    facts_path(paths[0]).write_text(json.dumps(facts))
    open_sources({"one": [str(paths[0])], "rest": [str(path) for path in paths[1:]]})
    assert not caplog.messages
    open_sources({"all": [str(path) for path in paths]})
    assert caplog.messages == [
        "note: source all: in 1 of 3 shards the text of a special token is its id "
        "(--parse-special-tokens), in the others it is characters"
    ]


def test_end_tokens_must_be_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same vocabulary with another end token is refused; files without end tokens are told of,
    and their documents are found in the index."""
    for name in ("with", "without"):
        _write(tmp_path / name, 70)
    _add_facts(tmp_path / "with")
    _add_facts(tmp_path / "without", append_eod=False)
    paths = {name: [str(tmp_path / name)] for name in ("with", "without")}
    with pytest.raises(DataError) as error:
        open_sources(paths, FINGERPRINT, 5)
    assert str(error.value) == (
        f"source with: the documents of {tmp_path}/with end with id 999, which is not the end "
        "token of data.tokenizer_model, 5"
    )
    caplog.clear()
    sources = open_sources(paths, FINGERPRINT, 999)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("source without: 1 of 1 shards were written without end tokens")
    assert sources["with"].document_ends(0, 30) == []
    assert sources["without"].document_ends(3, 30) == [3, 10, 17, 24]


def test_digests_follow_contents_and_not_paths(tmp_path: Path) -> None:
    """Moved files keep their digest; with facts another checksum changes it, without them other
    sizes or tokens do, and not what older plans have."""

    def digest(prefix: Path) -> str:
        return open_sources({"web": [str(prefix)]})["web"].shards[0].digest

    _write(tmp_path / "a", 70)
    _write(tmp_path / "b", 77)
    bare = digest(tmp_path / "a")
    assert bare != digest(tmp_path / "b")
    for end in (".bin", ".idx"):
        shutil.copy(tmp_path / f"a{end}", tmp_path / f"moved{end}")
    assert digest(tmp_path / "moved") == bare
    before = open_shard(tmp_path / "moved")
    tokens = np.fromfile(tmp_path / "moved.bin", dtype="<u2")
    tokens[-1] += 1
    tokens.tofile(tmp_path / "moved.bin")
    assert digest(tmp_path / "moved") != bare
    assert open_shard(tmp_path / "moved").older_digest == before.older_digest
    _add_facts(tmp_path / "a")
    with_facts = digest(tmp_path / "a")
    _add_facts(tmp_path / "a", bin={"bytes": 140, "sha256": "f" * 64})
    assert len({bare, with_facts, digest(tmp_path / "a")}) == 3


def test_a_file_that_changes_under_a_run_is_an_error(tmp_path: Path) -> None:
    """Another size at the first read, or an end before its time: named, not read as noise."""
    out = np.empty(50, dtype=np.int64)
    for name in ("a", "b"):
        _write(tmp_path / name, 70)
    sources = open_sources({name: [str(tmp_path / name)] for name in "ab"})
    _write(tmp_path / "a", 77)
    with pytest.raises(DataError, match=r"a\.bin has changed since the run opened it"):
        sources["a"].read(0, out)
    sources["b"].read(0, out)
    with (tmp_path / "b.bin").open("r+b") as file:
        file.truncate(60)
    with pytest.raises(DataError, match=r"b\.bin was cut short while the run read it"):
        sources["b"].read(0, out)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.bin: No such file"):
        sources["a"].read(0, out)
