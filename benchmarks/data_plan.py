"""Planning and reading data against megatron-core's GPTDataset, in one run on the same files.

    python benchmarks/data_plan.py --json data_plan.json

Three parts, by default all of them: `fetch`, samples read one by one in order from a `.bin` of real
ids; `build`, a blend from files to the first sample; `scale`, the same for 15T tokens of 200
sources, ours alone. Files for the last two are sparse: they hold sizes and no tokens.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.config.phases import Phase, normalised
from megatron_hybrid.data.layout import make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.planned_windows import PlannedWindows
from megatron_hybrid.data.source import Source, open_sources
from megatron_hybrid.data.stream import PlannedSource
from megatron_hybrid.data.tokenizer import NullTokenizer

VOCABULARY = 131_072
DOCUMENT = 4096  # tokens
BATCH = 768  # samples
SEED = 1234
BUILD_LENGTH = 8192
Fetch = Callable[[int], Any]
Result = dict[str, Any]


def write_index(prefix: Path, documents: int, *, sparse: bool = False) -> None:
    """A pair of `documents` documents of 4096 int32 tokens, as Megatron writes it, with a `.bin`
    of no contents; `sparse`: only the ends of the `.idx` have any."""
    offset = 9 + 8 + 1 + 8 + 8
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, documents, documents + 1))
        if sparse:
            file.seek(offset + 4 * (documents - 1))
            file.write(struct.pack("<i", DOCUMENT))
            file.seek(offset + 4 * documents + 8 * (documents - 1))
            file.write(struct.pack("<q", 4 * DOCUMENT * (documents - 1)))
            file.truncate(offset + 12 * documents + 8 * (documents + 1))
        else:
            file.write(np.full(documents, DOCUMENT, dtype="<i4").tobytes())
            file.write((np.arange(documents, dtype="<i8") * 4 * DOCUMENT).tobytes())
            file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(4 * DOCUMENT * documents)


def blend(number: int, sources: int) -> dict[str, float]:
    """Weights over two decades, other ones for each number."""
    logs = np.random.default_rng(number).uniform(-2, 0, sources)
    return normalised({f"s{i}": float(weight) for i, weight in enumerate(10**logs)})


def plan_of(
    sources: dict[str, Source], phases: list[Phase], batch: int = BATCH
) -> tuple[Plan, PlannedWindows]:
    """A plan over all tokens of the sources, and its windows."""
    longest = max(phase.seq_length for phase in phases)
    planned = [
        PlannedSource(
            name,
            tuple(shard.digest for shard in source.shards),
            source.tokens,
            0,
            source.tokens,
            longest,
        )
        for name, source in sources.items()
    ]
    plan = make_plan(phases, planned, [(0, batch)], SEED)
    return plan, PlannedWindows(plan, sources, NullTokenizer(VOCABULARY))


class EngineTokenizer(NullTokenizer):
    """With what GPTDataset names its index files by."""

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"fingerprint": self.fingerprint}


def engine_dataset(folder: Path, weights: dict[str, float], samples: int, seq_length: int) -> Any:
    """megatron-core's dataset of the sources in a folder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefixes = [str(folder / name) for name in weights]
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=seq_length,
        blend=(prefixes, list(weights.values()) if len(prefixes) > 1 else None),
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=EngineTokenizer(VOCABULARY),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


# Fetch


def fetch(folder: Path, length: int, samples: int, rounds: int) -> Result:
    """Samples a second of each way to read, the ways taking turns over `samples` each."""
    import torch

    from megatron_hybrid.data.packing import pack_documents

    torch.set_num_threads(1)  # as in the worker of a loader
    sources = open_sources({"s0": [str(folder / "s0")]})
    count = sources["s0"].tokens // length * 9 // 10
    phase = Phase("all", 0, count * length, {"s0": 1.0}, length)
    _, windows = plan_of(sources, [phase], batch=1)
    engine = engine_dataset(folder, {"s0": 1.0}, count, length)

    def ours_packed(index: int) -> None:
        window = torch.from_numpy(windows.__getitems__([index]))
        pack_documents(window[:, :-1] == windows.eod)

    ways: dict[str, Fetch] = {
        "ours": lambda index: windows.__getitems__([index]),
        "ours, packed documents": ours_packed,
        "GPTDataset": lambda index: engine[index],
        "GPTDataset, its ids alone": lambda index: engine._query_document_sample_shuffle_indices(
            index
        )[0].astype(np.int64),
    }
    for index in range(8):  # what is asked for is what is compared
        assert ways["ours"](index).shape == (1, length + 1)
        assert engine[index]["tokens"].dtype == torch.int64
        assert ways["GPTDataset, its ids alone"](index).shape == (length + 1,)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first warms up
        first = number * samples % (count - samples)
        for way, get in ways.items():
            start = time.perf_counter()
            for index in range(first, first + samples):
                get(index)
            seconds[way].append(time.perf_counter() - start)
    rates = {way: samples / statistics.median(times[1:]) for way, times in seconds.items()}
    return {
        "seq_length": length,
        "samples_per_s": rates,
        "ours_to_peer": rates["ours"] / rates["GPTDataset"],
        "ours_to_its_ids_alone": rates["ours"] / rates["GPTDataset, its ids alone"],
    }


# Build and scale


def build_ours(folder: Path, samples: int, count: int) -> None:
    sources = open_sources({f"s{i}": [str(folder / f"s{i}")] for i in range(count)})
    end = samples * BUILD_LENGTH
    middle = end * 6 // 10
    phases = [
        Phase("one", 0, middle, blend(1, count), BUILD_LENGTH),
        Phase("two", middle, end, blend(2, count), BUILD_LENGTH),
    ]
    _, windows = plan_of(sources, phases)
    windows.__getitems__([0])


def build_engine(folder: Path, samples: int, count: int) -> None:
    engine_dataset(folder, blend(1, count), samples, BUILD_LENGTH)[0]


def measured(side: str, folder: Path, samples: int, sources: int, pipe: Connection) -> None:
    """Sends seconds, and MiB of memory beyond those of the process with all libraries imported."""
    import torch  # noqa: F401

    if side == "engine":
        import megatron.core.datasets.gpt_dataset  # noqa: F401

        from megatron_hybrid import platform

        platform.initialize()
    before = resident_mib("VmRSS")
    start = time.perf_counter()
    (build_ours if side == "ours" else build_engine)(folder, samples, sources)
    seconds = time.perf_counter() - start
    pipe.send((seconds, resident_mib("VmHWM") - before))


def build(folder: Path, sides: list[str], samples: int, sources: int, rounds: int) -> Result:
    """From files to the first sample; every round in fresh processes, medians."""
    context = multiprocessing.get_context("spawn")
    seen: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    written: dict[str, tuple[int, float]] = {}
    for side in itertools.chain.from_iterable(itertools.repeat(sides, rounds)):
        before = files_in(folder)
        here, there = context.Pipe()
        process = context.Process(target=measured, args=(side, folder, samples, sources, there))
        process.start()
        there.close()
        seen[side].append(here.recv())
        process.join()
        new = files_in(folder) - before
        written[side] = (len(new), sum(path.stat().st_size for path in new) / 1e6)
        for path in new:
            path.unlink()
    return {"samples": samples, "sources": sources} | {
        side: {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "peak_mib": statistics.median(mib for _, mib in runs),
            "files_written": written[side][0],
            "megabytes_written": written[side][1],
        }
        for side, runs in seen.items()
    }


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def resident_mib(field: str) -> float:
    """A field of /proc/self/status: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def results(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Result]]:
    if "fetch" in arguments.parts:
        prefix = folder / "fetch" / "s0"
        prefix.parent.mkdir()
        documents = arguments.tokens // DOCUMENT
        write_index(prefix, documents)
        ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, documents * DOCUMENT, np.int32)
        ids[DOCUMENT - 1 :: DOCUMENT] = VOCABULARY - 1
        ids.tofile(f"{prefix}.bin")
        for length in arguments.lengths:
            yield "fetch", fetch(prefix.parent, length, arguments.samples, arguments.rounds)
    for part, sides, samples, sources in (
        ("build", ["ours", "engine"], 10**6, 20),
        ("scale", ["ours"], 15 * 10**12 // BUILD_LENGTH, 200),
    ):
        if part in arguments.parts:
            (folder / part).mkdir()
            documents = samples * BUILD_LENGTH // sources // DOCUMENT
            for number in range(sources):
                write_index(folder / part / f"s{number}", documents, sparse=part == "scale")
            yield part, build(folder / part, sides, samples, sources, arguments.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["fetch", "build", "scale"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in the .bin of `fetch`")
    parser.add_argument("--samples", type=int, default=500, help="that a way reads in a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to put the files; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    from megatron_hybrid import platform

    platform.initialize()
    collected = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for part, result in results(arguments, Path(folder)):
            collected.append({"part": part} | result)
            print(part, json.dumps(result, indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(collected, indent=2) + "\n")


if __name__ == "__main__":
    main()
