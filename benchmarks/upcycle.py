"""Upcycling a checkpoint with 24 MLP layers against `cp` of what it writes, on the same disk.

A dense bf16 checkpoint is made from random weights; then, in turns, it is upcycled (two copies of
each MLP, cut into eight), and the result is copied. Medians of the times are compared, and the peak
memory with the size of one MLP.

    python benchmarks/upcycle.py --folder /somewhere/on/a/real/disk --json upcycle.json
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from convert import Turn, size_gb, sync, take_turn
from convert_checkpoint import make_checkpoint
from rich.console import Console
from rich.table import Table

from megatron_hybrid.config import RunConfig, build_config

MLP_LAYERS = 24
EXPERTS, GRANULARITY, TOPK = 2, 8, 8
COMMAND = [sys.executable, "-m", "megatron_hybrid.cli", "upcycle"]
TABLE_WIDTH = 100


@dataclass(frozen=True)
class Measured:
    """Over all rounds; GB are 10^9 bytes.

    Attributes:
        written_gb: the upcycled checkpoint.
        speed: of `cp`'s, 1 being equal.
        mlp_gb: both matrices of one MLP of the dense model.
        peak_gb: largest resident set of the process in any round, mapped files included.
        mlps_above_1_gb: the peak, less 1 GB, in MLPs.
    """

    dense_gb: float
    written_gb: float
    cp_seconds: float
    seconds: float
    speed: float
    mlp_gb: float
    peak_gb: float
    mlps_above_1_gb: float


def dense_config(hidden_size: int) -> RunConfig:
    """24 MLPs four times as wide as the model, between small Mamba-2 layers."""
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": "M-" * MLP_LAYERS,
                "hidden_size": hidden_size,
                "ffn_hidden_size": 4 * hidden_size,
                "mamba_num_heads": 8,
                "mamba_num_groups": 1,
                "vocab_size": 8192,
            },
            "precision": {"recipe": "bf16"},
            "data": {"mock_data": True, "tokenizer_type": "null"},
            "training": {"train_iters": 1},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        },
        world_size=1,
        has_cuda=False,
    )


def measure(folder: Path, hidden_size: int, rounds: int, warm: bool) -> Measured:
    """Upcycle and copy in turns; what the last round wrote stays until the folder is removed."""
    dense, moe, copy = folder / "dense", folder / "moe", folder / "copy"
    upcycle = [
        *COMMAND, "--load", str(dense), "--save", str(moe), "--experts", str(EXPERTS),
        "--granularity", str(GRANULARITY), "--topk", str(TOPK), "--no-restart-schedule",
    ]  # fmt: skip
    turns: dict[str, list[Turn]] = {"upcycle": [], "cp": []}
    for _ in range(rounds):
        turns["upcycle"].append(take_turn(upcycle, dense, moe, warm))
        turns["cp"].append(take_turn(["cp", "-r", str(moe), str(copy)], moe, copy, warm))
        shutil.rmtree(copy)
    seconds, cp_seconds = (
        statistics.median(turn.seconds for turn in turns[name]) for name in ("upcycle", "cp")
    )
    peak = max(turn.peak_gb for turn in turns["upcycle"])
    mlp = 2 * hidden_size * 4 * hidden_size * 2 / 1e9
    return Measured(
        size_gb(dense), size_gb(moe), cp_seconds, seconds, cp_seconds / seconds, mlp, peak,
        (peak - 1) / mlp,
    )  # fmt: skip


def print_table(it: Measured, rounds: int, warm: bool) -> None:
    cache = "in the page cache" if warm else "read from the disk"
    table = Table(title=f"Medians of {rounds} rounds, source {cache}, output synced to the disk")
    names = ("dense GB", "written GB", "cp s", "ours s", "speed of cp's", "an MLP, GB", "peak GB",
             "MLPs above 1 GB")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    table.add_row(
        f"{it.dense_gb:.2f}", f"{it.written_gb:.2f}", f"{it.cp_seconds:.1f}", f"{it.seconds:.1f}",
        f"{it.speed:.0%}", f"{it.mlp_gb:.2f}", f"{it.peak_gb:.2f}", f"{it.mlps_above_1_gb:.2f}",
    )  # fmt: skip
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--hidden-size", type=int, default=3072, help="4.0 GB dense, 7.6 GB MoE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="read sources from the page cache")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upcycle-", dir=args.folder) as name:
        folder = Path(name)
        needed_gb = 40 * (args.hidden_size / 4096) ** 2
        free_gb = shutil.disk_usage(folder).free / 1e9
        if free_gb < needed_gb:
            raise SystemExit(f"{folder} has {free_gb:.1f} GB free; {needed_gb:.0f} needed")
        # In a process of its own: what a parent holds when it starts a command would count as the
        # command's peak.
        make = multiprocessing.get_context("spawn").Process(
            target=make_checkpoint, args=(folder / "dense", dense_config(args.hidden_size))
        )
        make.start()
        make.join()
        if make.exitcode:
            raise SystemExit("the dense checkpoint could not be made")
        sync(folder)
        measured = measure(folder, args.hidden_size, args.rounds, args.warm)
    print_table(measured, args.rounds, args.warm)
    if args.json:
        args.json.write_text(json.dumps(asdict(measured), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
