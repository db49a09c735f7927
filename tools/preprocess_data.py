#!/usr/bin/env python3
"""Tokenise text into `.bin`/`.idx`, with the flags and file names of Megatron-LM's script.

    python tools/preprocess_data.py --input web.jsonl --output-prefix data/web \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json \\
        --append-eod --workers 8

writes data/web_text_document.bin and .idx, byte for byte what Megatron-LM's writes, and a
.meta.json with their checksums. `megatron-hybrid data tokenize` is the same in plainer words.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from megatron_hybrid.commands.app import option_problem
from megatron_hybrid.data.facts import TokenizerType
from megatron_hybrid.data.tokenizer import ENCODERS
from megatron_hybrid.data.tokenizing import TokenizeSettings
from megatron_hybrid.data.tokenizing.console import tokenize_on_console
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import refusals_told

TOKENIZER_TYPES: dict[str, TokenizerType] = {
    "sentencepiece": "sentencepiece",
    "huggingface": "huggingface",
    "null": "null",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "huggingface",
    "NullTokenizer": "null",
}
MEMORY_GIB = 2.0
# Of Megatron-LM's flags, those that would give another result than is made here.
REFUSED = {
    "--split-sentences": "documents are not split: pre-training packs them whole",
    "--keep-newlines": "documents are not split into sentences, and keep every character",
    "--find-optimal-num-workers": "the time left is shown as it runs; one worker a core is fastest",
}
# And those that say how Megatron-LM's script should go about it.
NEEDLESS = {
    "--partitions": "one run uses all --workers on all files, and keeps their order",
    "--keep-sequential-samples": "the order of the input is always kept",
    "--log-interval": "progress is shown as time passes",
}


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        with refusals_told():
            tokenize_on_console(parse(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        return 130
    return 0


def parse(words: list[str]) -> TokenizeSettings:
    parser = _parser()
    arguments = parser.parse_args(words)
    for name, value in vars(arguments).items():
        for each in value if isinstance(value, list) else [value]:
            if problem := option_problem(each):
                parser.error(f"--{name.replace('_', '-')}: {problem}")
    for flag, why in REFUSED.items():
        if vars(arguments)[_name(flag)]:
            parser.error(f"{flag} is not supported: {why}")
    for flag, why in NEEDLESS.items():
        if vars(arguments)[_name(flag)]:
            logging.info("%s changes nothing: %s", flag, why)
    keys = arguments.json_keys
    if len(set(keys)) < len(keys):
        parser.error(f"--json-keys {' '.join(keys)} must name each key once")
    if arguments.shuffle_memory_gib != MEMORY_GIB and arguments.shuffle_seed is None:
        parser.error("--shuffle-memory-gib: only with --shuffle-seed")
    prefix = arguments.output_prefix
    return TokenizeSettings(
        inputs=tuple(arguments.input),
        outputs={key: Path(f"{prefix}_{key}_document") for key in keys},
        rejected_path=Path(f"{prefix}_rejected.jsonl"),
        tokenizer_type=TOKENIZER_TYPES[arguments.tokenizer_type],
        tokenizer_model=arguments.tokenizer_model,
        vocab_size=arguments.vocab_size,
        parse_special_tokens=arguments.parse_special_tokens,
        encoder=arguments.encoder,
        append_eod=arguments.append_eod,
        shuffle_seed=arguments.shuffle_seed,
        shuffle_memory_bytes=int(arguments.shuffle_memory_gib * 2**30),
        workers=arguments.workers,
        max_rejected_fraction=arguments.max_rejected_fraction,
    )


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=text, **options)

    add("--input", "JSONL (plain, gzip, zstd) or parquet: files or globs", nargs="+", required=True)
    add("--output-prefix", "outputs are PREFIX_<key>_document.*", required=True)
    add("--tokenizer-type", ", ".join(TOKENIZER_TYPES), choices=TOKENIZER_TYPES, required=True,
        metavar="TYPE")  # fmt: skip
    add("--tokenizer-model", "a sentencepiece .model, or a tokenizer.json or its folder", type=Path)
    add("--vocab-size", "only for null: ids lie below it, and the last one ends documents; "
        "Megatron-LM's NullTokenizer means one more", type=int)  # fmt: skip
    add("--json-keys", "one output for each (default: text)", nargs="+", default=["text"])
    add("--append-eod", "end each document with the end token", action="store_true")
    add("--workers", "processes that encode (default: 1)", type=int, default=1)
    add("--max-rejected-fraction", "rejected lines per line above which nothing is written "
        "(default: 0.001)", type=float, default=0.001)  # fmt: skip
    add("--shuffle-seed", "put the documents in a random order (default: that of the input)",
        type=int)  # fmt: skip
    add("--shuffle-memory-gib", "tokens held in memory meanwhile; what is more is written to disk "
        "once more (default: 2)", type=float, default=MEMORY_GIB)  # fmt: skip
    add("--parse-special-tokens", "let the text of a special token become its id",
        action="store_true")  # fmt: skip
    add("--encoder", "library for huggingface: %(choices)s (default: auto)", choices=ENCODERS,
        default="auto", metavar="NAME")  # fmt: skip
    for flag, why in (REFUSED | NEEDLESS).items():
        takes_value = flag in ("--partitions", "--log-interval")
        action: dict[str, Any] = {"type": int} if takes_value else {"action": "store_true"}
        add(flag, f"{'refused' if flag in REFUSED else 'needless'}: {why}", **action)
    return parser


if __name__ == "__main__":
    sys.exit(main())
