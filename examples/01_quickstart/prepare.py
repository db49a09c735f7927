#!/usr/bin/env python3
"""Make a small real corpus from the Python on this machine: no download, under a minute.

    python examples/01_quickstart/prepare.py [folder]      (default: data/quickstart)

writes three sources as JSONL: code (the standard library's modules, a document a file), docs (their
documentation strings) and reference (the language reference that help() shows, a document a topic).
Then it trains a sentencepiece tokenizer on them, and tokenises them with the code behind
`megatron-hybrid data tokenize`. Does nothing when the folder already holds it all, whole.
"""

import argparse
import ast
import hashlib
import json
import platform
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from sentencepiece import SentencePieceTrainer

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import write_atomic

VOCAB_SIZE = 4096
TRAINING_TEXT_CHARS = 4_000_000
TRAINING_PIECE_CHARS = 2_000
# Not the library's own prose and code, or not shipped everywhere.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__",
}  # fmt: skip
TOKENIZER = "tokenizer.model"
MANIFEST = "manifest.json"
SOURCES = ("code", "docs", "reference")
ENDINGS = (".jsonl", ".bin", ".idx", ".meta.json")
MADE = (TOKENIZER, *(source + ending for source in SOURCES for ending in ENDINGS))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/quickstart"))
    folder = parser.parse_args().folder
    try:
        if is_whole(folder):
            print(f"{folder} is complete: nothing to do")
        else:
            prepare(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(folder: Path) -> None:
    """Make every file of the corpus; the manifest last, so that its presence means whole."""
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    code = list(standard_library_sources())
    sources = {
        "code": code,
        "docs": [docs for text in code if (docs := documentation(text))],
        "reference": [text for text in topics.values() if text.strip()],
    }
    if not code:
        raise DataError(f"no Python sources in {sysconfig.get_path('stdlib')}")
    train_tokenizer([text for texts in sources.values() for text in texts], folder / TOKENIZER)
    for name, texts in sources.items():
        lines = (json.dumps({"text": text}) for text in texts)
        write_atomic(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        prefix = folder / name
        report = tokenize(
            TokenizeSettings(
                inputs=(str(folder / f"{name}.jsonl"),),
                outputs={"text": prefix},
                rejected_path=folder / f"{name}_rejected.jsonl",
                tokenizer_type="sentencepiece",
                tokenizer_model=folder / TOKENIZER,
                shuffle_seed=0,  # what is held out is the end of the file
            )
        )
        facts = report.facts["text"]
        print(
            f"{prefix}: {facts.documents} documents, {report.input_bytes / 1e6:.1f} MB, "
            f"{facts.tokens:,} tokens"
        )
    write_atomic(folder / MANIFEST, json.dumps(describe(folder), indent=2) + "\n")
    print(f"{folder / TOKENIZER}: {VOCAB_SIZE} pieces; all in {time.monotonic() - start:.0f} s")


def standard_library_sources() -> Iterator[str]:
    """The text of each source file."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few declare another encoding
            if text.strip():
                yield text


def documentation(source: str) -> str:
    """The documentation strings of a source file, each under the name of what it describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in old modules
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a sample of another Python's grammar
            return ""
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, described) and (text := ast.get_docstring(node)):
            name = getattr(node, "name", None)
            parts.append(f"{name}\n\n{text}" if name else text)
    return "\n\n".join(parts)


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Train a BPE tokenizer that gives back every text exactly, on pieces spread over `texts`."""
    total = sum(len(text) for text in texts)
    stride = TRAINING_PIECE_CHARS * max(1, total // TRAINING_TEXT_CHARS)
    pieces = (
        text[begin : begin + TRAINING_PIECE_CHARS]
        for text in texts
        for begin in range(0, len(text), stride)
    )
    with tempfile.TemporaryFile() as model:
        SentencePieceTrainer.train(
            sentence_iterator=pieces,
            model_writer=model,
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            # Spaces and line breaks are code too: nothing is folded, runs may be one piece.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * TRAINING_PIECE_CHARS,  # in bytes
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
        model.seek(0)
        write_atomic(path, model.read())


def describe(folder: Path) -> dict[str, object]:
    """What the corpus was made from and what it is: the content of the manifest."""
    return {
        "python": platform.python_version(),
        "recipe_sha256": file_sha256(Path(__file__)),
        "files": {name: file_sha256(folder / name) for name in MADE},
    }


def is_whole(folder: Path) -> bool:
    """Whether the folder holds what this script, with this Python, would make."""
    try:
        return json.loads((folder / MANIFEST).read_text()) == describe(folder)
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
