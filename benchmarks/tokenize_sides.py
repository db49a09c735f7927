"""The sides of `data_tokenize.py`, each in a process of its own, all of them on the same core."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

# Documents to a call of HF's encode_batch, which keeps an object with offsets for each of them.
HF_BATCH = 256


@dataclass(frozen=True)
class Task:
    """What is encoded, by all sides.

    Attributes:
        corpus: JSONL with a `text` in each line.
        tokenizer: folder of a `tokenizer.json`.
        output: folder for what is written.
        rounds: turns of each side. The slow ones take another such part of the corpus each time.
        core: CPU that all sides run on.
    """

    corpus: Path
    tokenizer: Path
    output: Path
    rounds: int
    core: int


@dataclass(frozen=True)
class Turn:
    """What one turn took; `input_bytes` of JSONL were encoded in it."""

    input_bytes: int
    seconds: float
    cpu_seconds: float


# Does the next part of its work; gives the bytes of JSONL that were in it.
Side = Callable[[], int]


def _parts(task: Task) -> Iterator[list[bytes]]:
    """The lines of the corpus in `task.rounds` parts of about the same size."""
    size = task.corpus.stat().st_size
    with task.corpus.open("rb") as file:
        for number in range(1, task.rounds + 1):
            yield file.readlines(max(size * number // task.rounds - file.tell(), 1))


def hf(task: Task) -> Iterator[Side]:
    """`encode_batch` of Hugging Face's tokenizers alone: texts in memory, ids not taken out."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(task.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for lines in _parts(task):
        texts = [json.loads(line)["text"] for line in lines]
        size = sum(map(len, lines))

        def encode(texts: list[str] = texts, size: int = size) -> int:
            for batch in itertools.batched(texts, HF_BATCH):
                tokenizer.encode_batch(list(batch), add_special_tokens=False)
            return size

        yield encode


def megatron(task: Task) -> Iterator[Side]:
    """Megatron-LM's way: a document at a time to ids, and on to megatron-core's builder."""
    import tokenizers
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = tokenizers.Tokenizer.from_file(str(task.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    config = json.loads((task.tokenizer / "tokenizer_config.json").read_text())
    eod = tokenizer.token_to_id(config["eos_token"])
    prefix = task.output / "megatron"
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, lines in enumerate(_parts(task), start=1):

        def encode(lines: list[bytes] = lines, number: int = number) -> int:
            for line in lines:
                ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
                ids.append(eod)
                builder.add_document(ids, [len(ids)])
            if number == task.rounds:
                builder.finalize(f"{prefix}.idx")
            return sum(map(len, lines))

        yield encode


def ours(task: Task) -> Iterator[Side]:
    """`megatron-hybrid data tokenize` from file to file: the whole corpus, each time anew."""
    return _tokenize(task, task.corpus)


def ours_start(task: Task) -> Iterator[Side]:
    """The same for a single document: what a run takes before it comes to its input."""
    single = task.output / "single.jsonl"
    with task.corpus.open("rb") as file:
        single.write_bytes(file.readline())
    return _tokenize(task, single)


def _tokenize(task: Task, corpus: Path) -> Iterator[Side]:
    from megatron_hybrid.data.tokenizing import TokenizeSettings, tokenize

    settings = TokenizeSettings(
        inputs=(str(corpus),),
        outputs={"text": task.output / "ours" / corpus.stem},
        rejected_path=task.output / "ours_rejected.jsonl",
        tokenizer_type="huggingface",
        tokenizer_model=task.tokenizer,
        workers=1,
    )
    for _ in range(task.rounds):
        yield lambda: tokenize(settings).input_bytes


SIDES: dict[str, Callable[[Task], Iterator[Side]]] = {
    "hf": hf,
    "megatron": megatron,
    "ours_start": ours_start,
    "ours": ours,
}


def serve(name: str, task: Task, pipe: Connection) -> None:
    """Take a turn whenever the pipe asks, and answer with it; at the end, with the peak in MiB."""
    os.sched_setaffinity(0, {task.core})
    # Whoever starts threads: one core is one thread. Ours sets both itself.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    for side in SIDES[name](task):
        pipe.send(None)  # ready
        pipe.recv()
        start, cpu_start = time.perf_counter(), time.process_time()
        size = side()
        pipe.send(Turn(size, time.perf_counter() - start, time.process_time() - cpu_start))
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    pipe.send(int(peak_kib) / 1024)
