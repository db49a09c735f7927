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
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from generate_bound import Bound
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
TABLE_WIDTH = 165
# Of requests whose whole greedy text is the same on both sides; bf16 rounds too much to ask it.
SAME_TEXT = 0.9
# Of the time for a case, what transformers may take over one run before it is stopped.
PEER_SHARE = 0.5
LEAST_SHARE_S = 20.0


@dataclass(frozen=True)
class Measured:
    """One side in one case.

    Attributes:
        prefill_s: to the first token of every sequence; 0 where requests are ragged.
        tokens_per_s: all new tokens over all the time, prompts included.
        decode_per_s: after the first token of every sequence; 0 where requests are ragged.
        peak_mib: resident memory at its peak, less that of the process before the model is built.
        runs: that the medians are of; 0: of the first alone, which warms up.
        stopped: it was, and has no more tokens/s than these.
    """

    prefill_s: float
    tokens_per_s: float
    decode_per_s: float
    peak_mib: float
    runs: int = 0
    stopped: bool = False


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


class _StoppedError(Exception):
    """The peer takes longer over one run than it is given."""


def compare(
    folder: Path, case: Case, rounds: int, share_s: float
) -> tuple[dict[str, Measured], Bound, float | None]:
    """Both sides in turns, the bound, and the share of requests with the same text.

    Args:
        share_s: of the time of all cases; no turn begins that would end after it.
    """
    end, peer_limit_s = time.monotonic() + share_s, share_s * PEER_SHARE

    def start(side: str) -> AbstractContextManager[Connection]:
        return side_process(side, serve, folder, case.dtype, case.threads)

    with start("ours") as ours:
        try:
            with start("peer") as peer:
                answers = take_turns({"peer": peer, "ours": ours}, case, rounds, end, peer_limit_s)
        except _StoppedError:
            answers = take_turns({"ours": ours}, case, 1, end)
        ours.send(("bound", case))
        bound, _ = ours.recv()
    sides = {side: measured(case, runs) for side, runs in answers.items()}
    if "peer" not in sides:
        tokens = sum(map(len, answers["ours"][0][0].tokens))
        peer_side = Measured(0.0, tokens / peer_limit_s, 0.0, 0.0, stopped=True)
        return {"peer": peer_side, **sides}, bound, None
    first = {side: runs[0][0].tokens for side, runs in answers.items()}
    same = [a == b for a, b in zip(first["peer"], first["ours"], strict=True)]
    return sides, bound, sum(same) / len(same)


def take_turns(
    pipes: dict[str, Connection], case: Case, rounds: int, end: float, peer_limit_s: float = 0.0
) -> dict[str, list[tuple[Run, float]]]:
    """What each side answers: once to warm up, then as often as is asked and there is time for."""
    answers: dict[str, list[tuple[Run, float]]] = {side: [] for side in pipes}
    turn_s = 0.0
    for turn in range(rounds + 1):
        start = time.monotonic()
        if turn and start + turn_s > end:
            break
        for side, pipe in pipes.items():
            pipe.send(("run", case))
            if side == "peer" and not pipe.poll(peer_limit_s):
                raise _StoppedError
            answers[side].append(pipe.recv())
        turn_s = time.monotonic() - start
    return answers


def measured(case: Case, runs: list[tuple[Run, float]]) -> Measured:
    timed = [run for run, _ in runs[1:] or runs]
    count = sum(map(len, timed[0].tokens))
    seconds = statistics.median(run.seconds for run in timed)
    prefill = 0.0 if case.ragged else statistics.median(run.prefill_s for run in timed)
    later = 0.0
    if not case.ragged and case.new_tokens > 1:
        gaps = [run.seconds - run.prefill_s for run in timed]
        later = (count - case.batch) / statistics.median(gaps)
    return Measured(prefill, count / seconds, later, max(peak for _, peak in runs), len(runs) - 1)


def new_table(threads: int) -> Table:
    table = Table(title=f"Generation, {threads} threads; memory above the process")
    for name in ("model", "dtype", "prompt", "batch", "side", "prefill ms", "", "tokens/s", "",
                 "after prefill", "", "peak MiB", "", "same text", "runs, bound by"):  # fmt: skip
        left = name in ("model", "dtype", "side", "runs, bound by")
        table.add_column(name, justify="left" if left else "right")
    return table


def add_rows(
    table: Table, case: Case, sides: dict[str, Measured], bound: Bound, same: float | None
) -> None:
    """The peer, ours and the bound; ratios to the peer: at least so much where it was stopped."""
    peer, ours = sides["peer"], sides["ours"]

    def number(value: float, sign: str = "") -> str:
        return f"{sign}{value:,.0f}" if value else ""

    def times(more: float, less: float) -> str:
        return f"{'>' * peer.stopped}{more / less:.2f}x" if more and less else ""

    def runs(it: Measured) -> str:
        return "stopped" if it.stopped else str(it.runs or "1 cold")

    def row(side: str, it: Measured, note: str) -> list[str]:
        first = side == "peer"
        return [
            side,
            number(1e3 * it.prefill_s),
            "" if first else times(peer.prefill_s, it.prefill_s),
            number(it.tokens_per_s, "<" * it.stopped),
            "" if first else times(it.tokens_per_s, peer.tokens_per_s),
            number(it.decode_per_s),
            "" if first else times(it.decode_per_s, peer.decode_per_s),
            number(it.peak_mib),
            f"{it.peak_mib / peer.peak_mib:.0%}" if side == "ours" and peer.peak_mib else "",
            f"{same:.0%}" if side == "ours" and same is not None else "",
            note,
        ]

    least = Measured(0.0, bound.tokens_per_s, 0.0, 0.0)
    if not case.ragged:
        least = replace(least, prefill_s=bound.prefill_s, decode_per_s=bound.decode_per_s)
    of = [case.model, case.dtype, f"{case.prompt}{' ragged' * case.ragged}", str(case.batch)]
    table.add_row(*of, *row("peer", peer, runs(peer)))
    table.add_row(*[""] * 4, *row("ours", ours, runs(ours)))
    table.add_row(*[""] * 4, *row("bound", least, bound.by), end_section=True)


def cases(args: argparse.Namespace) -> list[Case]:
    """What is asked for, without what takes minutes on either side unless that is asked for too."""
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
    """64 prompts of 2048 tokens through 33 million parameters: ours takes minutes, too."""
    return case.model == "33M" and case.prompt > 64 and case.batch > 16


def _work(case: Case) -> int:
    """About how long a case takes beside others."""
    tokens = sum(len(prompt) + new for prompt, new in case.requests(1))
    return tokens * int(case.model.removesuffix("M"))


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
    parser.add_argument(
        "--minutes", type=float, default=25.0,
        help="for all cases: each has an equal share of what is left, and fewer runs where they "
        "are long",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    table, records, wrong = new_table(args.threads), [], []
    found: dict[Case, tuple[dict[str, Measured], Bound, float | None]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            make_model(name, Path(temporary) / name)
        # The short ones first, which leave some of their shares to the long ones.
        order = sorted(cases(args), key=_work)
        end = time.monotonic() + 60 * args.minutes
        for number, case in enumerate(order):
            start = time.monotonic()
            share_s = max((end - start) / (len(order) - number), LEAST_SHARE_S)
            found[case] = compare(Path(temporary) / case.model, case, args.rounds, share_s)
            print(f"{case}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    for case in cases(args):
        sides, bound, same = found[case]
        add_rows(table, case, sides, bound, same)
        records.append({**asdict(case), "same_text": same, "bound": asdict(bound),
                        **{side: asdict(it) for side, it in sides.items()}})  # fmt: skip
        if case.dtype == "fp32" and same is not None and same < SAME_TEXT:
            wrong.append(f"{case}: {same:.0%} of the texts are the same")
    # Wide enough for every column, where the output is a file too.
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
