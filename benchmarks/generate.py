"""Generation against Hugging Face transformers' `generate`, on the same weights and CPU.

Two models, the quickstart's of 2 million parameters and `train_step.py`'s of 33, are made and
converted; both sides answer the same requests in turns, each in its own process, and medians are
compared. The run fails unless both write the same greedy text.

    python benchmarks/generate.py --json generate.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from generate_sides import SEED, Case, Run, serve
from rich.console import Console
from rich.table import Table
from side_process import side_process
from step_model import Case as StepCase
from step_model import our_config

from megatron_hybrid.config import RunConfig, load_config, rules

MODELS = ("2M", "33M")
# Wide enough that the likeliest token leads: of what both compute alike, rounding decides nothing.
INIT_STD = {"2M": 0.08, "33M": 0.05}
TABLE_WIDTH = 132
# Of requests whose whole greedy text is the same on both sides; bf16 rounds too much to ask it.
SAME_TEXT = 0.9
# Where transformers takes longer over a run, it is run once, without one to warm up.
LONG_RUN_S = 8.0


@dataclass(frozen=True)
class Measured:
    """One side in one case.

    Attributes:
        prefill_s: to the first token of every sequence; 0 where requests are ragged.
        tokens_per_s: all new tokens over all the time, prompts included.
        decode_per_s: after the first token of every sequence; 0 where requests are ragged.
        peak_mib: resident memory at its peak, less that of the process before the model is built.
    """

    prefill_s: float
    tokens_per_s: float
    decode_per_s: float
    peak_mib: float


def model_config(name: str) -> RunConfig:
    """The config of a model with random weights, saved by a run of one step."""
    if name == "2M":
        words = ["tiny", "--mock-data", "--tokenizer-type", "null", "model.vocab_size=2048"]
        config = load_config([*words, "training.train_iters=1"], which=rules.NO_FILES)
    else:
        config = our_config(StepCase(64, "fp32", 1))
    return config.model_copy(
        update={"model": config.model.model_copy(update={"init_method_std": INIT_STD[name]})}
    )


def make_model(name: str, folder: Path) -> None:
    """A checkpoint in `folder/run`, and the same model for transformers in `folder/hf`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(model_config(name).to_yaml(), encoding="utf-8")
    words = [
        "config.yaml", "run_dir=run", "training.train_iters=1", "data.seq_length=64",
        "training.global_batch_size=1", "training.micro_batch_size=1", f"training.seed={SEED}",
        "training.eval_interval=null", "optimizer.lr=1e-9", "optimizer.min_lr=0",
    ]  # fmt: skip
    for command in (["pretrain", *words], ["convert", "to-hf", "run", "hf"]):
        line = [sys.executable, "-m", "megatron_hybrid.cli", *command]
        subprocess.run(line, cwd=folder, check=True, capture_output=True)


def compare(folder: Path, case: Case, rounds: int) -> tuple[dict[str, Measured], float]:
    """Both sides in turns, and the share of requests with the same text."""
    answers: dict[str, list[tuple[Run, float]]] = {}
    with ExitStack() as processes:
        pipes = {
            side: processes.enter_context(
                side_process(side, serve, folder, case.dtype, case.threads)
            )
            for side in ("peer", "ours")
        }
        for _ in range(rounds + 1):
            for side, pipe in pipes.items():
                pipe.send(case)
                answers.setdefault(side, []).append(pipe.recv())
            if answers["peer"][0][0].seconds > LONG_RUN_S:
                break
    first = {side: runs[0][0].tokens for side, runs in answers.items()}
    same = [a == b for a, b in zip(first["peer"], first["ours"], strict=True)]
    return {side: measured(case, runs) for side, runs in answers.items()}, sum(same) / len(same)


def measured(case: Case, runs: list[tuple[Run, float]]) -> Measured:
    timed = [run for run, _ in runs[1:] or runs]
    count = sum(map(len, timed[0].tokens))
    seconds = statistics.median(run.seconds for run in timed)
    prefill = 0.0 if case.ragged else statistics.median(run.prefill_s for run in timed)
    later = 0.0
    if not case.ragged and case.new_tokens > 1:
        gaps = [run.seconds - run.prefill_s for run in timed]
        later = (count - case.batch) / statistics.median(gaps)
    return Measured(prefill, count / seconds, later, max(peak for _, peak in runs))


def new_table(threads: int) -> Table:
    table = Table(title=f"Generation, {threads} threads; memory above the process")
    for name in ("model", "dtype", "prompt", "batch", "side", "prefill ms", "", "tokens/s", "",
                 "after prefill", "", "peak MiB", "", "same text"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("model", "dtype", "side") else "right")
    return table


def add_rows(table: Table, case: Case, sides: dict[str, Measured], same: float) -> None:
    peer = sides["peer"]

    def times(ours: float, theirs: float) -> str:
        return f"{ours / theirs:.2f}x" if theirs and ours else ""

    for side, it in sides.items():
        first = side == "peer"
        table.add_row(
            case.model if first else "",
            case.dtype if first else "",
            f"{case.prompt}{' ragged' * case.ragged}" if first else "",
            str(case.batch) if first else "",
            side,
            f"{1e3 * it.prefill_s:,.0f}" if it.prefill_s else "",
            "" if first else times(peer.prefill_s, it.prefill_s),
            f"{it.tokens_per_s:,.0f}",
            "" if first else times(it.tokens_per_s, peer.tokens_per_s),
            f"{it.decode_per_s:,.0f}" if it.decode_per_s else "",
            "" if first else times(it.decode_per_s, peer.decode_per_s),
            f"{it.peak_mib:,.0f}",
            "" if first else f"{it.peak_mib / peer.peak_mib:.0%}",
            "" if first else f"{same:.0%}",
            end_section=not first,
        )


def cases(args: argparse.Namespace) -> list[Case]:
    """What is asked for, without what would take minutes each unless that is asked for too."""
    asked = [
        Case(model, dtype, prompt, batch, kind == "ragged", args.new_tokens, args.threads)
        for model in args.models
        for dtype in args.dtypes
        for prompt in args.prompts
        for batch in args.batches
        for kind in args.kinds
        if not (kind == "ragged" and batch == 1)
    ]
    return [case for case in asked if args.full or not _takes_minutes(case)]


def _takes_minutes(case: Case) -> bool:
    """What transformers would take so long over that the whole would not end in a quarter hour."""
    if case.dtype == "bf16":
        return case.ragged or case.prompt > 64 or case.batch > 16
    return case.prompt > 64 and (case.ragged or (case.model == "33M" and case.batch > 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--kinds", nargs="+", choices=("equal", "ragged"), default=["equal", "ragged"]
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="also what takes minutes a case")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    table, records, wrong = new_table(args.threads), [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            make_model(name, Path(temporary) / name)
        for case in cases(args):
            start = time.monotonic()
            sides, same = compare(Path(temporary) / case.model, case, args.rounds)
            print(f"{case}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            add_rows(table, case, sides, same)
            records.append({**asdict(case), "same_text": same,
                            **{side: asdict(it) for side, it in sides.items()}})  # fmt: skip
            if case.dtype == "fp32" and same < SAME_TEXT:
                wrong.append(f"{case}: {same:.0%} of the texts are the same")
    # Wide enough for every column, where the output is a file too.
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
