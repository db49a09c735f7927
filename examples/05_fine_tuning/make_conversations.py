#!/usr/bin/env python3
"""Make a base text and conversations from the Python on this machine: no download, under a minute.

    python examples/05_fine_tuning/make_conversations.py [folder]  (default: data/fine_tuning)

writes docs.jsonl (documentation, a document a module), what.jsonl (what does a function do?)
and takes.jsonl (what does it take?), and a byte-level tokenizer with a chat template.
"""

import argparse
import ast
import json
import runpy
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hybrid.fileio import write_atomic

HERE = Path(__file__).parent
QUICKSTART = runpy.run_path(str(HERE.parent / "01_quickstart" / "prepare.py"))
VOCAB_SIZE = 4096
MOST_CHARACTERS = 200  # of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/fine_tuning"))
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(QUICKSTART["standard_library_sources"]())
    docs = [text for source in sources if (text := QUICKSTART["documentation"](source))]
    lines: dict[str, list[dict[str, object]]] = {"what": [], "takes": []}
    lines["docs"] = [{"text": text} for text in docs]
    for name, arguments, purpose in (each for source in sources for each in functions(source)):
        lines["what"].append(chat(f"What does {name} do?", purpose))
        question, answer = f"What does {name} take?", f"{name}({arguments})"
        lines["takes"].append({"prompt": question, "completion": answer})
    for file, objects in lines.items():
        content = "".join(json.dumps(each) + "\n" for each in objects)
        write_atomic(folder / f"{file}.jsonl", content)
        print(f"{folder / file}.jsonl: {len(objects):,} lines")
    make_tokenizer(docs, folder / "tokenizer")


def chat(question: str, answer: str) -> dict[str, object]:
    """A conversation as most data sets have it."""
    turns = {"system": "You know Python's library.", "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, arguments and purpose of each public function that is documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        purpose = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 0 < len(purpose) <= MOST_CHARACTERS:
            yield node.name, ", ".join(each.arg for each in node.args.args), purpose


def make_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-pair tokenizer, the tokens of turns among its special ones, and its chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str())
    # A turn ends as a document does, so that generating stops there.
    write_atomic(folder / "tokenizer_config.json", json.dumps({"eos_token": "<|im_end|>"}))
    shutil.copy(HERE / "chat_template.jinja", folder)
    print(f"{folder}: {tokenizer.get_vocab_size():,} tokens")


if __name__ == "__main__":
    main()
