"""Every command in the documentation: run in the order of the pages, in one folder, with files of
a user's; those that need what a test has not are read, and the page says why.
"""

import gzip
import json
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from sentencepiece import SentencePieceTrainer

from tests.data.chat.templates import tokenizer_folder
from tests.docs import LANGUAGES, Block, blocks, pages
from tests.docs.commands import commands, read, run

# What a page's commands read, pages before it have made.
ORDER = ("getting-started", "data", "train", "cluster", "resume", "convert", "upcycle")
CHAT = {"prompt": "1+1?", "completion": "2"}
BLOCKS = [block for page in pages() for block in blocks(page)]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]
RUN = [block for block in COMMANDS if not block.not_run]
RUN.sort(key=lambda block: [Path(block.page).stem != name for name in ORDER])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has texts, a tokenizer, and the files that the pages show."""
    folder = tmp_path_factory.mktemp("docs")
    texts = [text[:3000] for text in topics.values()]
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts[:30] for line in text.splitlines() if line),
        model_prefix=str(folder / "tokenizer"), vocab_size=400, hard_vocab_limit=False,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    for name, start, opener in (("web/0.jsonl.gz", 0, gzip.open), ("code/0.jsonl", 1, open)):
        (folder / name).parent.mkdir()
        with opener(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[start:40:2])
    (folder / "prompts.jsonl").write_text('{"prompt": "Classes", "n": 2}\n', encoding="utf-8")
    (folder / "chats.jsonl").write_text(20 * f"{json.dumps(CHAT)}\n", encoding="utf-8")
    tokenizer_folder(folder / "models" / "mine")
    for block in BLOCKS:
        first = block.text.partition("\n")[0].removeprefix("# ")
        if block.language in ("python", "yaml") and first.endswith((".py", ".yaml")):
            (folder / first).parent.mkdir(exist_ok=True)
            (folder / first).write_text(block.text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("block", RUN, ids=[block.name for block in RUN])
def test_commands_run(block: Block, folder: Path) -> None:
    """Each ends with 0."""
    for words in commands(block.text):
        trains = "pretrain" in words and not {"--dry-run", "--help"} & {*words}
        run([*words, *(block.run_with.split() if trains else ())], folder)


def test_what_is_not_run_is_read() -> None:
    """Bash reads it; programs, options, fields, files and targets that it names are there."""
    for block in COMMANDS:
        if block.not_run:
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert not done.stderr, block.name
            for words in commands(block.text):
                read(words)


def test_a_wrong_command_is_not_read() -> None:
    """An option, field, file, target or program that there is not."""
    for line in (
        "srun megatron-hybrid generate runs/web --promt x", "megatron-hybrid counts tiny a.b=1",
        "python tools/no.py", "python tools/plot_run.py --no", "make nothing", "nothing at all",
        "megatron-hybrid nothing", "srun megatron-hybrid pretrain tiny model.hidden_size=a",
    ):  # fmt: skip
        with pytest.raises(Exception, match=r"."):
            read(commands(line)[0])


def test_every_block_says_what_it_is() -> None:
    """A block without a language would pass by both tests."""
    assert [block.name for block in BLOCKS if block.language not in LANGUAGES] == []
    lines = [line for page in pages() for line in page.read_text("utf-8").splitlines()]
    notes = sum(line.startswith("<!--") for line in lines)
    assert notes == sum(bool(block.not_run or block.run_with) for block in BLOCKS)
