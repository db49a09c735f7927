"""Conversion to and from Hugging Face's format against `cp` of the same files, on the same disk.

A checkpoint of about 4 GB is made from random weights; then, in turns, it is copied, converted to
Hugging Face's format, that folder is copied, and converted back. Medians of the times are compared.

    python benchmarks/convert.py --folder /somewhere/on/a/real/disk --json convert.json
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
CONVERT = [sys.executable, "-m", "megatron_hybrid.cli", "convert"]
TABLE_WIDTH = 100


@dataclass(frozen=True)
class Turn:
    """One command: wall time from its start until its output is on the disk, and peak memory.

    Attributes:
        peak_gb: largest resident set (10^9 bytes) of the process, mapped files included.
    """

    seconds: float
    peak_gb: float


@dataclass(frozen=True)
class Compared:
    """One direction, over all rounds.

    Attributes:
        gigabytes: read, 10^9 bytes; about as many are written.
        speed: of `cp`'s, 1 being equal.
        peak_above_tensor_gb: the largest peak of all rounds less the largest tensor.
    """

    gigabytes: float
    cp_seconds: float
    seconds: float
    speed: float
    peak_gb: float
    peak_above_tensor_gb: float


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in files_of(folder)) / 1e9


def sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> None:
    """Let the next reader of a folder read from the disk; the files are synced."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def take_turn(command: list[str], source: Path, output: Path, warm: bool) -> Turn:
    """Run a command that makes `output` from `source`."""
    shutil.rmtree(output, ignore_errors=True)
    if warm:
        for path in files_of(source):
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    else:
        drop_from_cache(source)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    sync(output)
    return Turn(time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9)


def largest_tensor_gb(huggingface: Path) -> float:
    """The largest tensor of a folder of safetensors, from the headers."""
    from safetensors import safe_open

    largest = 0
    for path in huggingface.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
                elements = 1
                for extent in shape:
                    elements *= extent
                largest = max(largest, elements * (4 if dtype == "F32" else 2))
    return largest / 1e9


def compare(checkpoint: Path, folder: Path, rounds: int, warm: bool) -> dict[str, Compared]:
    """Both directions, each beside `cp` of what it reads; the four take turns."""
    model, back, copy = folder / "huggingface", folder / "back", folder / "copy"
    to_hf = [*CONVERT, "to-hf", str(checkpoint), str(model)]
    from_hf = [*CONVERT, "from-hf", str(model), str(back)]
    turns: dict[str, list[Turn]] = {}
    for _ in range(rounds):
        for name, command, source, output in (
            ("cp to", ["cp", "-r", str(checkpoint), str(copy)], checkpoint, copy),
            ("to-hf", to_hf, checkpoint, model),
            ("cp from", ["cp", "-r", str(model), str(copy)], model, copy),
            ("from-hf", from_hf, model, back),
        ):
            turns.setdefault(name, []).append(take_turn(command, source, output, warm))
    tensor_gb = largest_tensor_gb(model)
    compared = {}
    for name, cp, source in (("to-hf", "cp to", checkpoint), ("from-hf", "cp from", model)):
        seconds = statistics.median(turn.seconds for turn in turns[name])
        cp_seconds = statistics.median(turn.seconds for turn in turns[cp])
        peak = max(turn.peak_gb for turn in turns[name])
        compared[name] = Compared(
            size_gb(source), cp_seconds, seconds, cp_seconds / seconds, peak, peak - tensor_gb
        )
    return compared


def print_table(compared: dict[str, Compared], rounds: int, warm: bool) -> None:
    cache = "in the page cache" if warm else "read from the disk"
    table = Table(title=f"Medians of {rounds} rounds, source {cache}, output synced to the disk")
    for name in (
        "",
        "GB",
        "cp s",
        "ours s",
        "speed of cp's",
        "peak GB",
        "above the largest tensor",
    ):
        table.add_column(name, justify="right")
    for name, it in compared.items():
        table.add_row(
            name, f"{it.gigabytes:.2f}", f"{it.cp_seconds:.1f}", f"{it.seconds:.1f}",
            f"{it.speed:.0%}", f"{it.peak_gb:.2f}", f"{it.peak_above_tensor_gb:.2f} GB",
        )  # fmt: skip
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="read sources from the page cache")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.folder) as name:
        folder = Path(name)
        free_gb = shutil.disk_usage(folder).free / 1e9
        if free_gb < 4.5 * args.gigabytes:
            raise SystemExit(f"{folder} has {free_gb:.1f} GB free; {4.5 * args.gigabytes} needed")
        make = [sys.executable, str(HERE / "convert_checkpoint.py"), str(folder / "checkpoints")]
        subprocess.run([*make, "--gigabytes", str(args.gigabytes)], check=True)
        sync(folder)
        compared = compare(folder / "checkpoints", folder, args.rounds, args.warm)
    print_table(compared, args.rounds, args.warm)
    if args.json:
        figures = {name: asdict(it) for name, it in compared.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
