"""A whole training step against Hugging Face transformers' on the same CPU.

A NemotronH of 33 million parameters, or a Falcon-H1 of 26, with the same weights and tokens on both
sides; they take turns, each in its own process, and the medians are compared beside the speed of
matrix products measured in between.

    python benchmarks/train_step.py --lengths 1024 4096 --json train_step.json
    python benchmarks/train_step.py --model falcon_h1 --lengths 2048
    python benchmarks/train_step.py --against COMMIT    # this tree's whole runs beside a commit's
"""

import argparse
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from side_process import side_process
from step_commits import CASES, compare_commits
from step_model import PEERS, Case, imported_config
from step_sides import GEMM_FLOPS, serve

from checkpoints_converter.importing import ImportOptions, import_model
from megatron_hybrid.model.counts import flops_per_token

# First losses of the same weights, in nats: fp32 differs by rounding, bf16 by far more.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
TABLE_WIDTH = 118


@dataclass(frozen=True)
class Measured:
    """What one side did in one case; `gflops` counts the model's FLOPs, `roofline` is GEMM's.

    Attributes:
        peak_mib: resident memory at its peak, less that of the process before the model is built.
        first_loss, last_loss: in nats, of the first step and of the last.
    """

    step_ms: float
    tokens_per_s: float
    gflops: float
    roofline_fraction: float
    peak_mib: float
    first_loss: float
    last_loss: float


def compare(case: Case, rounds: int) -> tuple[dict[str, Measured], float]:
    """Both sides over `rounds` turns after one to warm up, and the GEMM roofline in GFLOP/s."""
    answers: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as processes:
        folder, pipes = Path(name), {}
        for side in ("peer", "ours", "gemm"):
            if side == "ours":  # from the weights that the peer has drawn
                imported = import_model(folder / "hf", folder / "run", ImportOptions()).folder
                model = imported_config(case, imported).model
            pipes[side] = processes.enter_context(side_process(side, serve, case, folder))
        for _ in range(rounds + 1):
            for side, pipe in pipes.items():
                pipe.send(True)
                answers.setdefault(side, []).append(pipe.recv())
    roofline = max(GEMM_FLOPS / seconds / 1e9 for seconds, _, _ in answers.pop("gemm"))
    flops = case.length * flops_per_token(model, case.length).total
    measured = {}
    for side, steps in answers.items():
        seconds = statistics.median(seconds for seconds, _, _ in steps[1:])
        gflops = flops / seconds / 1e9
        measured[side] = Measured(
            step_ms=1e3 * seconds,
            tokens_per_s=case.length / seconds,
            gflops=gflops,
            roofline_fraction=gflops / roofline,
            peak_mib=steps[-1][2],
            first_loss=steps[0][1],
            last_loss=steps[-1][1],
        )
    return measured, roofline


def check_losses(case: Case, measured: dict[str, Measured]) -> None:
    """Both sides did the same work if they found the same loss; SystemExit if not."""
    difference = abs(measured["ours"].first_loss - measured["peer"].first_loss)
    if not difference <= LOSS_TOLERANCE[case.dtype]:
        raise SystemExit(
            f"{case}: first losses differ by {difference:.2e} nats, over the tolerance of "
            f"{LOSS_TOLERANCE[case.dtype]}: ours {measured['ours'].first_loss}, peer "
            f"{measured['peer'].first_loss}"
        )


def new_table(model: str, threads: int) -> Table:
    title = f"Training step of {model}, batch 1, {threads} threads; memory above the process"
    table = Table(title=title)
    for name in ("length", "dtype", "side", "ms", "tokens/s", "speed", "GFLOP/s", "of GEMM",
                 "peak MiB", "memory", "first loss", "last loss"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("dtype", "side") else "right")
    return table


def add_rows(table: Table, case: Case, measured: dict[str, Measured], roofline: float) -> None:
    peer = measured["peer"]
    for side, it in measured.items():
        is_peer = side == "peer"
        table.add_row(
            str(case.length) if is_peer else "",
            case.dtype if is_peer else "",
            side,
            f"{it.step_ms:,.0f}",
            f"{it.tokens_per_s:,.0f}",
            "" if is_peer else f"{peer.step_ms / it.step_ms:.2f}x",
            f"{it.gflops:,.0f}",
            f"{it.roofline_fraction:.0%}",
            f"{it.peak_mib:,.0f}",
            "" if is_peer else f"{it.peak_mib / peer.peak_mib:.0%}",
            f"{it.first_loss:.5f}",
            f"{it.last_loss:.5f}",
        )
    table.add_row("", "", "GEMM", "", "", "", f"{roofline:,.0f}", "100%", end_section=True)


def print_commits(commit: str, pairs: int, threads: int) -> None:
    print(f"| fp32, {threads} threads | {commit} ms | here, ms | ratio | quartiles | losses |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        found = compare_commits(case, commit, pairs, threads)
        low, high = found.quartiles
        losses = "the same bits" if found.same_losses else "others"
        print(
            f"| {case} | {found.old_ms:.1f} | {found.new_ms:.1f} | {found.ratio:.3f} | "
            f"{low:.3f} to {high:.3f} | {losses} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PEERS, default="nemotron_h")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--against", metavar="COMMIT", help="steps of this tree beside a commit's")
    parser.add_argument("--pairs", type=int, default=20, help="turns of each with --against")
    args = parser.parse_args()
    if args.against:
        print_commits(args.against, args.pairs, args.threads)
        return
    # Read when a side's process starts; more threads than asked for would spin.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    table, records = new_table(args.model, args.threads), []
    for length in args.lengths:
        for dtype in args.dtypes:
            case = Case(length, dtype, args.threads, args.model)
            measured, roofline = compare(case, args.rounds)
            check_losses(case, measured)
            add_rows(table, case, measured, roofline)
            sides = {side: asdict(it) for side, it in measured.items()}
            records.append({**asdict(case), "gemm_gflops": roofline, **sides})
    # Wide enough for every column, where the output is a file too.
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
