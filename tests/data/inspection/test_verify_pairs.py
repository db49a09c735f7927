"""`data verify` finds what is wrong with a pair, and names it with its file and place."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from megatron_hybrid.cli import app
from megatron_hybrid.data.facts import Facts, facts_path, read_facts
from megatron_hybrid.data.indexed import indexed_paths
from megatron_hybrid.data.inspection.verdict import Verdict
from megatron_hybrid.data.inspection.verify import Expected, verify
from megatron_hybrid.data.tokenizer import build_tokenizer
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from tests.data.conftest import write_corpus, write_jsonl

VOCAB_SIZE = 100
EOD = 99
TEXTS = ("1 2 3", "4", "5 6 7 8 9")  # 4, 2 and 6 tokens with their ends: 24 bytes
HEADER = 34  # bytes of the .idx before the lengths


def write_pair(prefix: Path, texts: Sequence[str] = TEXTS, *, append_eod: bool = True) -> Path:
    """Tokenise documents of ids, with facts; gives the prefix."""
    tokenize(
        TokenizeSettings(
            inputs=(str(write_jsonl(prefix.with_suffix(".jsonl"), texts)),),
            outputs={"text": prefix},
            rejected_path=prefix.with_name("rejected.jsonl"),
            tokenizer_type="null",
            tokenizer_model=None,
            vocab_size=VOCAB_SIZE,
            append_eod=append_eod,
        )
    )
    return prefix


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "web.v1")


def check(prefix: Path, expected: Expected | None = None) -> Verdict:
    return verify(prefix, expected or Expected(), lambda count: None)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def change(path: Path, at: int, value: np.generic) -> None:
    """Overwrite one number."""
    content = bytearray(path.read_bytes())
    content[at : at + value.itemsize] = value.tobytes()
    path.write_bytes(content)


def append(path: Path, ids: NDArray) -> None:
    path.write_bytes(path.read_bytes() + ids.tobytes())


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def stale_index(prefix: Path) -> None:
    """A new .bin beside an old .idx, and the old facts."""
    other = write_pair(prefix.with_name("other"), ["1 2", "3 4 5 6 7 8 9 10 11 12 13 14"])
    indexed_paths(other)[0].replace(indexed_paths(prefix)[0])


def stale_of_equal_size(prefix: Path) -> None:
    """The same, where both have as many tokens."""
    other = write_pair(prefix.with_name("other"), ["1 2 3 4 5 6", "10 11 12 13"])
    indexed_paths(other)[0].replace(indexed_paths(prefix)[0])


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_facts(prefix: Path) -> None:
    cut(facts_path(prefix), 100)


def wrong_counts(prefix: Path) -> None:
    facts = read_facts(prefix)
    assert facts is not None
    wrong = replace(
        facts, documents=4, tokens=13, longest_document_tokens=7, highest_token=98,
        input=replace(facts.input, lines=4),
    )  # fmt: skip
    facts_path(prefix).write_text(wrong.to_json())


BIN, IDX, FACTS = "{prefix}.bin", "{prefix}.idx", "{name}.meta.json"
PAIRS_DIFFER = "the two are not from one run, or one was cut short"
CHANGED = "its content has changed since it was written"
# What is done to the pair of a prefix, and the problems that must be found, all of them.
BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated .bin": (
        lambda prefix: cut(indexed_paths(prefix)[0], 13),
        [
            f"{BIN} has 13 bytes; {{name}}.idx describes 24: {PAIRS_DIFFER}",
            f"{BIN} has 13 bytes; {FACTS} says 24",
        ],
    ),
    "empty .bin": (
        lambda prefix: cut(indexed_paths(prefix)[0], 0),
        [
            f"{BIN} has 0 bytes; {{name}}.idx describes 24: {PAIRS_DIFFER}",
            f"{BIN} has 0 bytes; {FACTS} says 24",
        ],
    ),
    "truncated .idx": (
        lambda prefix: cut(indexed_paths(prefix)[1], 100),
        [
            f"{IDX} has 100 bytes; its header promises 102: it was cut short or damaged",
            f"{IDX} has 100 bytes; {FACTS} says 102",
        ],
    ),
    "empty .idx": (
        lambda prefix: cut(indexed_paths(prefix)[1], 0),
        [f"{IDX} is not an index of Megatron's format", f"{IDX} has 0 bytes; {FACTS} says 102"],
    ),
    "stale .idx": (
        stale_index,
        [
            "{bin}: document 0, token 3 (byte 6): the document ends with id 3, not with the end "
            "token 99; and 2 more like it",
            f"{BIN} has 32 bytes; {{name}}.idx describes 24: {PAIRS_DIFFER}",
            f"{BIN} has 32 bytes; {FACTS} says 24",
        ],
    ),
    "stale .idx of equal size": (
        stale_of_equal_size,
        [
            "{bin}: document 0, token 3 (byte 6): the document ends with id 4, not with the end "
            "token 99; and 1 more like it",
            f"{BIN} has SHA-256 {{bin_sha}}…; {FACTS} says {{old_bin_sha}}…: {CHANGED}",
        ],
    ),
    "flipped bit in the .bin": (
        lambda prefix: flip(indexed_paths(prefix)[0], 2),
        [f"{BIN} has SHA-256 {{bin_sha}}…; {FACTS} says {{old_bin_sha}}…: {CHANGED}"],
    ),
    "flipped bit in a length": (
        lambda prefix: flip(indexed_paths(prefix)[1], HEADER + 4, 3),
        [
            "{idx}: document 2 begins at byte 12 by its offset, at 28 by the lengths before it",
            f"{BIN} has 24 bytes; {{name}}.idx describes 40: {PAIRS_DIFFER}",
            f"{IDX} has SHA-256 {{idx_sha}}…; {FACTS} says {{old_idx_sha}}…: {CHANGED}",
            f"{FACTS} says tokens=12; the files have 20",
            f"{FACTS} says longest_document_tokens=6; the files have 10",
        ],
    ),
    "flipped bit in an offset": (
        lambda prefix: flip(indexed_paths(prefix)[1], HEADER + 12 + 8, 1),
        [
            "{idx}: document 1 begins at byte 10 by its offset, at 8 by the lengths before it",
            f"{IDX} has SHA-256 {{idx_sha}}…; {FACTS} says {{old_idx_sha}}…: {CHANGED}",
        ],
    ),
    "flipped bit in a mark": (
        lambda prefix: flip(indexed_paths(prefix)[1], HEADER + 36 + 8, 1),
        [
            "{idx}: document mark 2 is 2; marks must rise from 0 to 3",
            f"{IDX} has SHA-256 {{idx_sha}}…; {FACTS} says {{old_idx_sha}}…: {CHANGED}",
        ],
    ),
    "negative length": (
        lambda prefix: change(indexed_paths(prefix)[1], HEADER + 8, np.int32(-6)),
        [
            "{idx}: document 2 has -6 tokens",
            f"{BIN} has 24 bytes; {{name}}.idx describes 0: {PAIRS_DIFFER}",
            f"{IDX} has SHA-256 {{idx_sha}}…; {FACTS} says {{old_idx_sha}}…: {CHANGED}",
            f"{FACTS} says tokens=12; the files have 0",
            f"{FACTS} says longest_document_tokens=6; the files have 4",
        ],
    ),
    ".bin with more behind its end": (
        lambda prefix: append(indexed_paths(prefix)[0], np.array([1, 2, 100], np.uint16)),
        [
            "{bin}: behind the last document (byte 28): id 100 is outside the vocabulary (0 … 99)",
            f"{BIN} has 30 bytes; {{name}}.idx describes 24: {PAIRS_DIFFER}",
            f"{BIN} has 30 bytes; {FACTS} says 24",
        ],
    ),
    "id out of range": (
        lambda prefix: change(indexed_paths(prefix)[0], 2 * 8, np.uint16(100)),
        [
            "{bin}: document 2, token 2 (byte 16): id 100 is outside the vocabulary (0 … 99)",
            f"{BIN} has SHA-256 {{bin_sha}}…; {FACTS} says {{old_bin_sha}}…: {CHANGED}",
            f"{FACTS} says highest_token=99; the files have 100",
        ],
    ),
    "lost end token": (
        lambda prefix: change(indexed_paths(prefix)[0], 2 * 5, np.uint16(7)),
        [
            "{bin}: document 1, token 1 (byte 10): the document ends with id 7, not with the end "
            "token 99",
            f"{BIN} has SHA-256 {{bin_sha}}…; {FACTS} says {{old_bin_sha}}…: {CHANGED}",
        ],
    ),
    "unreadable .bin": (
        lambda prefix: folder_instead(indexed_paths(prefix)[0]),
        ["cannot read {bin}: Is a directory"],
    ),
    "unreadable .idx": (
        lambda prefix: folder_instead(indexed_paths(prefix)[1]),
        ["cannot read {idx}: Is a directory"],
    ),
    "missing .bin": (lambda prefix: indexed_paths(prefix)[0].unlink(), ["{bin} is missing"]),
    "missing .idx": (lambda prefix: indexed_paths(prefix)[1].unlink(), ["{idx} is missing"]),
    "facts of other files": (
        wrong_counts,
        [
            f"{FACTS} says documents=4; the files have 3",
            f"{FACTS} says tokens=13; the files have 12",
            f"{FACTS} says longest_document_tokens=7; the files have 6",
            f"{FACTS} says highest_token=98; the files have 99",
        ],
    ),
    "unreadable facts": (
        lambda prefix: folder_instead(facts_path(prefix)),
        ["{prefix}.meta.json cannot be read: Is a directory"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pairs(kind: str, pair: Path) -> None:
    """Each damage gives exactly the problems that it is, each with its file and place."""
    damage, expected = BAD[kind]
    before = read_facts(pair)
    assert before is not None
    damage(pair)
    shas = {}
    for name, path in zip(("bin", "idx"), indexed_paths(pair), strict=True):
        if path.is_file():
            shas[f"{name}_sha"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    shas |= {"old_bin_sha": before.bin.sha256[:12], "old_idx_sha": before.idx.sha256[:12]}
    places = {"prefix": pair, "name": pair.name, "bin": f"{pair}.bin", "idx": f"{pair}.idx"}
    assert check(pair).problems == [text.format(**places, **shas) for text in expected]


def test_good_pair(pair: Path) -> None:
    """A pair as it was written has no problems, and everything was checked."""
    tokenizer = build_tokenizer("null", None, vocab_size=VOCAB_SIZE)
    assert check(pair, Expected(tokenizer)) == Verdict(pair, [], [], documents=3, tokens=12)


def test_damaged_facts(pair: Path) -> None:
    """Facts that are no JSON are a problem of their own; the pair is checked all the same."""
    damage_facts(pair)
    flip(indexed_paths(pair)[1], HEADER + 12, 1)
    problems = check(pair).problems
    assert len(problems) == 2
    assert problems[0].startswith(f"{pair}.meta.json is damaged: not JSON (")
    assert problems[1].startswith(f"{pair}.idx: document 0 begins at byte 2 by its offset")


def test_wrong_tokenizer(pair: Path) -> None:
    """A tokenizer that did not make the pair is a problem, and so is a smaller vocabulary."""
    other = build_tokenizer("null", None, vocab_size=50)
    facts = read_facts(pair)
    assert facts is not None
    assert check(pair, Expected(other)).problems == [
        f"{pair}.bin: document 0, token 3 (byte 6): id 99 is outside the vocabulary (0 … 49); "
        "and 2 more like it",
        f"{pair} was made with another tokenizer (null, fingerprint "
        f"{facts.tokenizer.fingerprint[:12]}…) than the one given ({other.fingerprint[:12]}…)",
    ]
    assert check(pair, Expected(vocab_size=8)).problems == [
        f"{pair}.bin: document 0, token 3 (byte 6): id 99 is outside the vocabulary (0 … 7); and "
        "4 more like it"
    ]


# Facts that tell where a pair comes from, and change nothing about what may be done with it.
PROVENANCE = {
    "tokenizer.type": "the fingerprint tells tokenizers apart",
    "tokenizer.parse_special_tokens": "the ids are what they are",
    "shuffle_seed": "a plan shuffles blocks whatever their order in the file",
    "input.files": "may be gone or moved",
}


def facts_fields(cls: type, above: str = "") -> list[str]:
    """The dotted names of all facts."""
    names: list[str] = []
    for field in fields(cls):
        inner = get_type_hints(cls)[field.name]
        name = f"{above}{field.name}"
        names += facts_fields(inner, f"{name}.") if is_dataclass(inner) else [name]
    return names


@pytest.mark.parametrize("name", facts_fields(Facts))
def test_every_fact_is_held_against_its_pair(tmp_path: Path, name: str) -> None:
    """One that is wrong is found; a new one must be looked at, or be listed as provenance."""
    prefix = write_pair(tmp_path / "web", append_eod=False)
    path = facts_path(prefix)
    content = json.loads(path.read_text())
    *outer, last = name.split(".")
    place = content
    for part in outer:
        place = place[part]
    changed = {
        bool: lambda value: not value,
        int: lambda value: value + 1,
        str: lambda value: {"uint16": "int32", "null": "huggingface"}.get(value, "0" * 64),
        list: lambda value: [],
        type(None): lambda value: 5,
    }
    place[last] = changed[type(place[last])](place[last])
    path.write_text(json.dumps(content))
    tokenizer = build_tokenizer("null", None, vocab_size=VOCAB_SIZE)
    assert bool(check(prefix, Expected(tokenizer)).problems) == (name not in PROVENANCE)


def test_without_facts(tmp_path: Path) -> None:
    """What Megatron-LM wrote is checked for what can be, and what cannot be is said."""
    prefix = Path(write_corpus(tmp_path / "plain", [[1, 2, 3], [70_000, 5]], vocab=100_000))
    verdict = check(prefix)
    assert verdict.problems == []
    assert verdict.unchecked == [
        f"checksums, counts, end tokens and the tokenizer: there is no {tmp_path}/plain.meta.json",
        "that ids lie in the vocabulary: its size is not known",
    ]
    assert check(prefix, Expected(vocab_size=70_001)).problems == []
    assert check(prefix, Expected(vocab_size=70_000)).problems == [
        f"{prefix}.bin: document 1, token 0 (byte 12): id 70000 is outside the vocabulary "
        "(0 … 69999)"
    ]
    change(indexed_paths(prefix)[0], 4, np.int32(-2))
    assert check(prefix).problems == [
        f"{prefix}.bin: document 0, token 1 (byte 4): id -2 is outside the vocabulary (0 and above)"
    ]


def test_no_document(tmp_path: Path) -> None:
    """A pair of nothing is named as such."""
    prefix = Path(write_corpus(tmp_path / "none", []))
    assert check(prefix).problems == [f"{prefix}.idx describes no document"]


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are right where the index and the ids are read in many blocks."""
    monkeypatch.setattr("megatron_hybrid.data.index._BLOCK", 7)
    monkeypatch.setattr("megatron_hybrid.data.inspection.verify._CHUNK_BYTES", 10)
    lengths = np.random.default_rng(5).integers(1, 12, 100)
    texts = [" ".join(["3"] * int(length)) for length in lengths]
    prefix = write_pair(tmp_path / "many", texts)
    assert check(prefix).problems == []
    starts = np.concatenate([[0], np.cumsum(lengths + 1)])
    bin_path = indexed_paths(prefix)[0]
    for document in (40, 77, 99):
        change(bin_path, 2 * int(starts[document]), np.uint16(500 + document))
        change(bin_path, 2 * int(starts[document + 1]) - 2, np.uint16(7))
    byte, end = 2 * int(starts[40]), 2 * int(starts[41]) - 2
    assert check(prefix).problems[:2] == [
        f"{bin_path}: document 40, token 0 (byte {byte}): id 540 is outside the vocabulary "
        "(0 … 99); and 2 more like it",
        f"{bin_path}: document 40, token {lengths[40]} (byte {end}): the document ends with id 7, "
        "not with the end token 99; and 2 more like it",
    ]


def test_megatron_reads_the_same(pair: Path) -> None:
    """megatron-core's own builder's pair is good: the check is of its format, not of ours."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = pair.with_name("theirs")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.tensor([1, 2, 3]), [3])
    builder.add_document(torch.tensor([4, 5, 6]), [1, 2])  # a document of two sequences
    builder.finalize(f"{prefix}.idx")
    verdict = check(prefix, Expected(vocab_size=7))
    assert verdict.problems == []
    assert verdict.tokens == 6


def test_command(pair: Path) -> None:
    """Exit codes: 0 where all is good, 1 where one pair is bad, each named with its problems."""
    good = CliRunner().invoke(app, ["data", "verify", str(pair)])
    assert good.exit_code == 0
    assert f"{pair}: good, 3 documents of 12 tokens" in good.stdout
    bad = write_pair(pair.with_name("web.v2"))
    flip(indexed_paths(bad)[0], 2)
    both = CliRunner().invoke(app, ["data", "verify", f"{pair.parent}/web.v*"])
    assert both.exit_code == 1
    assert f"{pair}: good" in both.stdout
    assert f"{bad}: 1 problem\n  - {bad}.bin has SHA-256" in both.stdout
    assert "not checked" not in both.stdout
    model = CliRunner().invoke(
        app, ["data", "verify", str(pair), "--tokenizer-type", "null", "--vocab-size", "60"]
    )
    assert model.exit_code == 1
    assert "was made with another tokenizer" in model.stdout
    for words in (["huggingface"], ["null", "--tokenizer-model", "x", "--vocab-size", "9"]):
        unused = CliRunner().invoke(app, ["data", "verify", str(pair), "--tokenizer-type", *words])
        assert unused.exit_code == 2 and "--tokenizer-model" in unused.output
