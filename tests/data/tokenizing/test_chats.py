"""Conversations from JSONL to files: in any order, with their masks; and a look at them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from megatron_hybrid.cli import app
from megatron_hybrid.config.token_files import restore
from megatron_hybrid.data.chat import ChatEncoder
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.facts import read_facts
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from tests.data.chat.templates import tokenizer_folder, tokenizer_for_chats
from tests.data.tokenizing.samples import check_sums, documents, rejected, settings_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("chat"))


def chat_settings(where: Path, folder: Path, lines: list[Any], **changes: Any) -> TokenizeSettings:
    """Settings over lines, which are objects or bytes."""
    content = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (where / "in.jsonl").write_bytes(b"\n".join(content) + b"\n")
    given = {"outputs": {"messages": where / "out"}, "tokenizer_type": "huggingface",
             "tokenizer_model": folder, "vocab_size": None, "chat": True}  # fmt: skip
    return settings_in(where, **(given | changes))


def line(number: int, answer: str = "It is so.") -> dict[str, Any]:
    return {"prompt": f"Is it {number}?" * (number % 5), "completion": answer}


def masks(prefix: Path) -> list[list[int]]:
    """The mask of each conversation, which agrees with its facts."""
    facts = read_facts(prefix)
    assert facts is not None and facts.mask is not None
    mask = np.fromfile(f"{prefix}.mask", dtype=np.uint8)
    assert (facts.mask.bytes, facts.learnt_tokens) == (facts.tokens, mask.sum())
    lengths = [len(document) for document in documents(prefix)]
    return [part.tolist() for part in np.split(mask, np.cumsum(lengths)[:-1])]


def test_in_any_order(folder: Path, tmp_path: Path) -> None:
    """Each conversation keeps its mask where they are shuffled, in memory or over the disk."""
    lines = [line(number, f"It is {number}.") for number in range(60)]
    chat = ChatEncoder(tokenizer_for_chats(folder))
    encoded = [chat.encode(record) for record in lines]
    expected = [(each["id"].tolist(), each["learnt"].tolist()) for each in encoded]
    orders = []
    for seed, memory in ((None, 2 << 30), (3, 2 << 30), (3, 700)):
        tokenize(chat_settings(tmp_path, folder, lines, shuffle_seed=seed,
                               shuffle_memory_bytes=memory))  # fmt: skip
        orders.append(list(zip(documents(tmp_path / "out"), masks(tmp_path / "out"), strict=True)))
    assert orders[0] == expected
    assert orders[1] == orders[2] != expected
    assert sorted(orders[1]) == sorted(expected)


def test_bad_lines(folder: Path, tmp_path: Path) -> None:
    """Lines of which nothing can be learnt are counted and listed, the others taken."""
    lines = [line(1), b"", b"{", [5], line(2, " "), {"messages": [{"role": "bot"}]}, line(3)]
    settings = chat_settings(tmp_path, folder, lines)
    report = tokenize(settings)
    counts = report.facts["messages"].input
    assert (counts.lines, counts.empty, counts.rejected) == (7, 1, 4)
    assert report.facts["messages"].documents == 2
    assert [(entry["line"], entry["reason"][:26]) for entry in rejected(settings)] == [
        (3, "malformed JSON: Expecting "), (4, "not a JSON object but a li"),
        (5, "completion is an empty ass"), (6, 'messages[0].role is "bot";'),
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"4 of 7 lines are bad.*The first is line 3 of .*jsonl"):
        tokenize(chat_settings(tmp_path, folder, lines, max_rejected_fraction=0.5))
    check_sums(tmp_path / "out", report.facts["messages"])  # those of before


def test_all_at_once(folder: Path, tmp_path: Path) -> None:
    """What cannot be is said before any work, together."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"messages": [[{"role": "user"}]]}), tmp_path / "a.parquet")
    settings = chat_settings(
        tmp_path, folder, [], inputs=(str(tmp_path / "a.parquet"),), append_eod=True,
        encoder="fastokens", chat_template=tmp_path / "none.jinja",
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        tokenize(settings)
    for part in ("4 problems", "parquet; --chat reads", "--append-eod: with", "--encoder fastokens",
                 "none.jinja cannot be read"):  # fmt: skip
        assert part in str(caught.value)
    null = chat_settings(tmp_path, folder, [], tokenizer_type="null", vocab_size=9)
    with pytest.raises(DataError, match="--chat needs --tokenizer-type huggingface"):
        tokenize(null)


def test_looked_at(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`show --chat` tells learnt tokens from others; `verify` finds a mask that was changed."""
    monkeypatch.setenv("COLUMNS", "1000")  # a path in a message is not cut into lines
    tokenize(chat_settings(tmp_path, folder, [line(1)]))
    prefix = tmp_path / "out"

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, ["data", *map(str, words)])

    shown = run("show", prefix, "--chat", 0, "--tokenizer-model", folder)
    assert shown.stdout == (
        "<|im_start|>user\nIs it 1?<|im_end|>\n<|im_start|>assistant\n⟦It is so.<|im_end|>\n⟧\n"
    )
    learnt = sum(masks(prefix)[0])
    assert f"{learnt} learnt" in shown.stderr
    ids = run("show", prefix, "--chat", 0, "--tokens").stdout
    assert len(ids[ids.index("⟦") : ids.index("⟧")].split()) == learnt
    assert "holds no conversations" in run("show", text_pair(tmp_path), "--chat", 0).output
    assert run("verify", prefix).exit_code == 0
    mask = Path(f"{prefix}.mask")
    content = mask.read_bytes()
    mask.write_bytes(b"\2" + content[1:-1] + b"\0")
    found = run("verify", prefix).stdout
    assert "its content has changed since" in found and "1 bytes that are neither" in found
    assert f"says learnt_tokens={learnt}; the files have {learnt - 1}" in found
    mask.write_bytes(content[1:])
    assert f"out.mask has {len(content) - 1} bytes" in run("verify", prefix).stdout
    assert isinstance(run("show", prefix, "--tokens", 0).exception, DataError)
    mask.unlink()
    assert f"{mask} is missing" in run("verify", prefix).stdout


def text_pair(where: Path) -> Path:
    """A pair that holds texts."""
    (where / "text.jsonl").write_text('{"text": "1 2"}\n')
    tokenize(settings_in(where, where / "text.jsonl", outputs={"text": where / "text"}))
    return where / "text"


def test_texts_in_place_of_conversations(folder: Path, tmp_path: Path) -> None:
    """Texts that take the place of conversations leave no mask behind."""
    tokenize(chat_settings(tmp_path, folder, [line(1)]))
    assert (tmp_path / "out.mask").exists()
    (tmp_path / "text.jsonl").write_text('{"text": "1 2"}\n')
    tokenize(settings_in(tmp_path, tmp_path / "text.jsonl"))
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.bin", "out.idx", "out.meta.json",
    ]  # fmt: skip


@pytest.mark.parametrize("chats", [True, False], ids=["of chats", "of texts"])
def test_an_older_pair_is_put_back(chats: bool, folder: Path, tmp_path: Path) -> None:
    """Killed at each step of replacing a pair by conversations, it comes back with its own mask,
    or with none."""
    prefix = tmp_path / "out"
    if chats:
        tokenize(chat_settings(tmp_path, folder, [line(1)]))
    else:
        (tmp_path / "text.jsonl").write_text('{"text": "1 2"}\n')
        tokenize(settings_in(tmp_path, tmp_path / "text.jsonl"))
    old = {path.name: path.read_bytes() for path in tmp_path.glob("out.*")}
    assert len(old) == (4 if chats else 3)
    aside, moved = [".idx", ".meta.json", *([".mask"] * chats), ".bin"], (".bin", ".mask")
    for step in range(1, len(aside) + len(moved) + 2):
        for end in aside[:step]:
            Path(f"{prefix}{end}").rename(f"{prefix}{end}.old.part")
        for end in (*moved, ".meta.json")[: max(0, step - len(aside))]:
            Path(f"{prefix}{end}").write_bytes(b"new")
        restore(str(prefix))
        assert {path.name: path.read_bytes() for path in tmp_path.glob("out.*")} == old
