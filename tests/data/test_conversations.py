"""Conversations in rows: whole, each once, with their masks; longer ones cut, and that is said."""

import hashlib
import json
import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.conversations import (
    ConversationSource,
    conversation_sources,
    note_ends,
    note_templates,
)
from megatron_hybrid.data.datasets import plan_data
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import facts_path
from megatron_hybrid.data.indexed import HEADER_BYTES
from megatron_hybrid.data.rows import pack_rows
from megatron_hybrid.data.source import open_sources
from megatron_hybrid.data.tokenizer import HuggingFaceTokenizer, NullTokenizer
from tests.data.chat.templates import tokenizer_folder
from tests.data.conftest import VOCAB_SIZE as TOKENS
from tests.data.conftest import write_conversations, write_corpus

VOCAB_SIZE = 50
EOD = VOCAB_SIZE - 1
ROW = 16


def test_best_fit() -> None:
    """The row with the least room that is enough takes a document; else a new one."""
    rows = pack_rows(np.array([9, 6, 4, 0, 7, 3, 10, 1]), 10)
    assert [rows[row] for row in range(len(rows))] == [[0, 7], [1, 2], [4, 5], [6]]
    assert len(pack_rows(np.array([0, 0]), 10)) == 0


def test_rows_are_full() -> None:
    """Every document is in one row, no row holds too much, and few places are left."""
    lengths = np.random.default_rng(1).geometric(1 / 500, size=20_000).clip(1, 4096)
    rows = pack_rows(lengths, 4096)
    assert sorted(rows.documents.tolist()) == list(range(len(lengths)))
    sizes = [int(lengths[rows[row]].sum()) for row in range(len(rows))]
    assert max(sizes) <= 4096
    assert sum(sizes) / (4096 * len(rows)) > 0.99


def conversation(draws: np.random.Generator, length: int) -> tuple[list[int], list[bool]]:
    """Random ids, the end token among them; the last of them are learnt."""
    ids = draws.integers(0, VOCAB_SIZE, size=length).tolist()
    return ids, [place >= length // 2 for place in range(length)]


@pytest.fixture
def written(tmp_path: Path) -> list[tuple[list[int], list[bool]]]:
    """30 conversations in two files: of 2 to 11 tokens; one that is learnt behind the row."""
    draws = np.random.default_rng(5)
    found = [conversation(draws, 2 + number % 10) for number in range(28)]
    found += [conversation(draws, 20), (list(range(20)), [False] * 17 + [True] * 3)]
    write_conversations(tmp_path / "chat_0", found[:10], VOCAB_SIZE)
    write_conversations(tmp_path / "chat_1", found[10:], VOCAB_SIZE)
    return found


def opened(folder: Path) -> ConversationSource:
    sources = open_sources({"chat": [str(folder / "chat_*")]})
    return conversation_sources(sources, ROW)["chat"]


def test_rows_of_a_source(
    tmp_path: Path, written: list[tuple[list[int], list[bool]]], caplog: pytest.LogCaptureFixture
) -> None:
    """Windows are whole conversations of all files, end tokens within them or not; what follows
    them is a document of its own, and not learnt; nothing of a window's last label is."""
    caplog.set_level(logging.INFO)
    source = opened(tmp_path)
    found = []
    for row in range(len(source.rows)):
        window, learnt = np.empty(ROW + 1, np.int64), np.empty(ROW + 1, np.bool_)
        source.read(row * ROW, window)
        source.read_learnt(row * ROW, learnt)
        begin = 0
        for end in source.document_ends(row * ROW, ROW + 1):
            found.append((window[begin : end + 1].tolist(), learnt[begin : end + 1].tolist()))
            begin = end + 1
        assert (window[begin:] == EOD).all() and not learnt[begin:].any()
    cut = [(ids[:ROW], learnt[:ROW]) for ids, learnt in written[:-1]]
    assert sorted(found) == sorted(cut)
    assert source.tokens == len(source.rows) * ROW + 1
    rows, warning = (record.getMessage() for record in caplog.records)
    tokens = sum(len(ids) for ids, _ in cut)
    assert rows == (
        f"source chat: 29 conversations in {len(source.rows)} rows of 16 tokens, which are "
        f"{100 * tokens / (len(source.rows) * ROW):.1f}% full"
    )
    assert warning == (
        "source chat: of 30 conversations 2 have more than data.seq_length=16 tokens, and what is "
        "behind is left out, 7 learnt tokens; 1 of these whole, with no answer in the first 16"
    )


def test_shares_and_places(tmp_path: Path, written: list[tuple[list[int], list[bool]]]) -> None:
    """A split is of whole rows, which all lie in one part; a token is described by its file."""
    source = opened(tmp_path)
    train, valid = (
        source.share(Fraction(0), Fraction(3, 4)),
        source.share(Fraction(3, 4), Fraction(1)),
    )
    assert train[0] == 0 and valid[1] == source.tokens
    assert train[1] == valid[0] + 1 and valid[0] % ROW == 0
    first = source.rows[0]
    assert source.describe(0) == f"source chat: {tmp_path}/chat_0.bin: document 0, token 0 (byte 0)"
    filled = sum(min(ROW, len(written[document][0])) for document in first)
    if filled < ROW:
        assert "no conversation fills" in source.describe(filled)
    last = len(source.rows) - 1
    assert "chat_1.bin: document" in source.describe(last * ROW)


def test_an_index_of_other_conversations(
    tmp_path: Path, written: list[tuple[list[int], list[bool]]]
) -> None:
    """Rows go by its lengths, which are looked at: a damaged one would cut elsewhere."""
    path = tmp_path / "chat_1.idx"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES] += 1  # the first length
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"chat_1\.idx is damaged: its documents have \d+ tokens, the"
    ):
        opened(tmp_path)


def test_files_without_masks(tmp_path: Path) -> None:
    """Texts are no conversations; all files that are not are named."""
    paths = [write_corpus(tmp_path / name, [[1, 2]], VOCAB_SIZE) for name in "ab"]
    with pytest.raises(DataError) as caught:
        conversation_sources(open_sources({"text": paths}), ROW)
    assert str(caught.value).count("has no mask of what is to be learnt (.mask); ") == 2


@pytest.mark.parametrize(
    ("made_with", "own", "told"),
    [
        ("aa", "a", []),
        ("ab", "a", ["note: conversations were made with 2 chat templates: those of s0; s1",
                     "note: s1: conversations were made with another chat template than that of "
                     "data.tokenizer_model: whoever chats with the model must use theirs"]),
        ("b", None, ["note: s0: conversations were made with another chat template than that of "
                     "data.tokenizer_model, which has none: whoever chats with the model must use "
                     "theirs"]),
    ],
)  # fmt: skip
def test_templates_that_conversations_were_made_with(
    made_with: str, own: str | None, told: list[str], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Are held against each other, and against the one that a checkpoint carries."""
    paths = {}
    for number, template in enumerate(made_with):
        paths[f"s{number}"] = [write_conversations(tmp_path / str(number), [([1, 2], [0, 1])], 9)]
        facts = facts_path(tmp_path / str(number))
        content = json.loads(facts.read_text())
        content["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        facts.write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(tokenizer_folder(tmp_path / "tokenizer", own))
    note_templates(open_sources(paths), tokenizer)
    assert caplog.messages == told


def test_answers_of_which_no_token_ends_a_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that learns them does not end, which is told; an end token that only the user says,
    or with which rows are filled up, is none that is learnt."""
    chats = {"a": ([5, EOD, 6, 7], [0, 0, 1, 1]), "b": ([5, 6, EOD], [0, 1, 1])}
    paths = {n: [write_conversations(tmp_path / n, [it], VOCAB_SIZE)] for n, it in chats.items()}
    sources = conversation_sources(open_sources(paths), ROW)
    caplog.clear()
    note_ends(sources, {EOD, 7}, NullTokenizer(VOCAB_SIZE))
    assert not caplog.messages
    note_ends(sources, {EOD, 8}, NullTokenizer(VOCAB_SIZE))
    (said,) = caplog.messages
    assert said.startswith("note: a: of what is learnt, no token ends a text, as 8 ('8'), 49 (")


def test_conversations_that_are_read_as_text(
    tmp_path: Path, make_config: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """Pre-training may read them, and says that it learns the users' part as well."""
    chats = [([1] * 400, [False, True] * 200)]
    blend = [
        [1, write_conversations(tmp_path / "chat", chats, TOKENS)],
        [1, write_corpus(tmp_path / "text", [[1] * 400])],
    ]
    tokenizer = NullTokenizer(TOKENS)
    for order, facts in (("plan", True), ("megatron", True), ("plan", False)):
        if not facts:  # the mask lies there all the same
            facts_path(tmp_path / "chat").unlink()
        plan_data(make_config({"data_path": blend, "sample_order": order}), tokenizer, None)
    said = [message for message in caplog.messages if "learns every token" in message]
    assert (
        said
        == [
            f"note: {tmp_path}/chat: conversations, of which training.objective=pretraining learns "
            "every token, whoever speaks; training.objective=sft learns what the assistant says"
        ]
        * 3
    )
    with pytest.raises(DataError, match=r"has no facts \(\.meta\.json\) of its mask"):
        conversation_sources(open_sources({"chat": [str(tmp_path / "chat")]}), ROW)
