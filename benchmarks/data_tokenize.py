"""Tokenising a corpus on one core against Hugging Face's tokenizers and Megatron-LM's way.

All sides take turns on the same core, each in its own process, and medians are compared. The run
fails unless the `.bin` and `.idx` are, byte for byte, those of megatron-core's builder.

    python benchmarks/data_tokenize.py --megabytes 100 --json data_tokenize.json
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenize_inputs import make_corpus, make_tokenizer
from tokenize_sides import SIDES, Task, Turn, serve

TABLE_WIDTH = 110
LABELS = {
    "hf": "tokenizers: encode_batch alone",
    "megatron": "Megatron-LM's way: tokenizers, a document at a time, and IndexedDatasetBuilder",
    "ours": "megatron-hybrid data tokenize",
    "after start": "  after its start",
}


@dataclass(frozen=True)
class Measured:
    """Medians of a side's turns, in MB of JSONL; `peak_mib` is resident memory of its process."""

    mb_per_s: float
    mb_per_cpu_s: float
    peak_mib: float


def run(task: Task) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """The turns of all sides, and their peaks of memory in MiB."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    with ExitStack() as ends:
        for name in SIDES:
            pipes[name], there = context.Pipe()
            process = context.Process(target=serve, args=(name, task, there), daemon=True)
            process.start()
            ends.callback(process.join)
            there.close()
        turns: dict[str, list[Turn]] = {name: [] for name in SIDES}
        for _ in range(task.rounds):
            for pipe in pipes.values():
                pipe.recv()  # all are ready before one begins
            for name, pipe in pipes.items():
                pipe.send(None)
                turns[name].append(pipe.recv())
        return turns, {name: pipe.recv() for name, pipe in pipes.items()}


def summarise(turns: dict[str, list[Turn]], peaks: dict[str, float]) -> dict[str, Measured]:
    """Medians; also of ours less what it takes to start, which a larger corpus would not feel."""
    start = statistics.median(turn.seconds for turn in turns["ours_start"])
    cpu_start = statistics.median(turn.cpu_seconds for turn in turns["ours_start"])
    sides = {name: turns[name] for name in ("hf", "megatron", "ours")}
    sides["after start"] = [
        Turn(turn.input_bytes, turn.seconds - start, turn.cpu_seconds - cpu_start)
        for turn in turns["ours"]
    ]
    peaks = peaks | {"after start": peaks["ours"]}
    return {
        name: Measured(
            statistics.median(turn.input_bytes / 1e6 / turn.seconds for turn in side),
            statistics.median(turn.input_bytes / 1e6 / turn.cpu_seconds for turn in side),
            peaks[name],
        )
        for name, side in sides.items()
    }


def check_files(task: Task) -> None:
    """SystemExit unless both writers wrote the same bytes."""
    for suffix in (".bin", ".idx"):
        theirs = task.output / f"megatron{suffix}"
        ours = task.output / "ours" / f"{task.corpus.stem}{suffix}"
        digests = []
        for path in (theirs, ours):
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        if digests[0] != digests[1]:
            raise SystemExit(f"{ours} is not, byte for byte, {theirs}")


def print_table(measured: dict[str, Measured], heading: str) -> None:
    table = Table(title=heading)
    for name in ("side", "MB/s", "x HF", "MB/CPU s", "x HF", "peak MiB"):
        table.add_column(name, justify="left" if name == "side" else "right")
    hf = measured["hf"]
    for name, it in measured.items():
        table.add_row(
            LABELS[name],
            f"{it.mb_per_s:,.2f}",
            f"{it.mb_per_s / hf.mb_per_s:.1f}",
            f"{it.mb_per_cpu_s:,.2f}",
            f"{it.mb_per_cpu_s / hf.mb_per_cpu_s:.1f}",
            f"{it.peak_mib:,.0f}",
        )
    # Wide enough for every column, where the output is a file too.
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100, help="of the corpus that is made")
    parser.add_argument("--corpus", type=Path, help="JSONL with a text in each line, instead")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json, instead")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, tokenizer, made = args.corpus, args.tokenizer, str(args.tokenizer)
        if corpus is None:
            corpus = folder / "corpus.jsonl"
            make_corpus(corpus, args.megabytes)
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            made = make_tokenizer(tokenizer, corpus)
        task = Task(corpus, tokenizer, folder, args.rounds, args.core)
        turns, peaks = run(task)
        check_files(task)
        size = corpus.stat().st_size / 1e6
    measured = summarise(turns, peaks)
    start = statistics.median(turn.seconds for turn in turns["ours_start"])
    print_table(measured, f"Tokenising {size:.0f} MB of JSONL on one core; tokenizer: {made}")
    print(
        f"Ours takes {start:.1f} s to start: to load fastokens, and to compare it with tokenizers."
    )
    print("The .bin and .idx are byte for byte those of megatron-core's IndexedDatasetBuilder.")
    if args.json:
        figures = {"megabytes": size, "tokenizer": made, "start_s": start}
        figures |= {name: asdict(it) for name, it in measured.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
