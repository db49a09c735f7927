"""The steps of two commits' `pretrain`, in turns: what `train_step.py --against COMMIT` measures.

Both runs are whole ones, each of its own tree's code, with its data, metrics and console; only one
of them runs at a time, the other is stopped (SIGSTOP), and the step within which it was is not
counted.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from start import HERE, tree_of
from step_model import PATTERN, VOCAB_SIZE

from launchers.forks import end_with_parent

_COMMON = [
    "data.mock_data=true", "data.tokenizer_type=null", "data.num_workers=0", "backend=torch",
    "training.train_iters=100000", "training.eval_interval=null", "training.log_interval=1",
    "training.global_batch_size=1", "training.micro_batch_size=1",
    "checkpoint.save_interval=null", "optimizer.lr=1e-3", "optimizer.lr_decay_style=constant",
    "precision.recipe=fp32",
]  # fmt: skip
# The model of `train_step.py`, and the preset that the quickstart trains.
CASES = {
    "33M, 1024 tokens": [
        f"model.hybrid_layer_pattern={PATTERN}", f"model.vocab_size={VOCAB_SIZE}",
        "model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_attention_heads=8",
        "model.num_query_groups=2", "model.kv_channels=64", "model.mamba_num_heads=16",
        "model.mamba_head_dim=64", "model.mamba_state_dim=64", "model.mamba_num_groups=1",
        "data.seq_length=1024",
    ],
    "tiny, 512 tokens": ["tiny", "model.vocab_size=4096", "data.seq_length=512"],
}  # fmt: skip
# Steps of a turn, of which the first is left out: the turn before may have ended within it.
TURN = 5
_LOST_S = 300


@dataclass(frozen=True)
class Compared:
    """Median step times in ms, the median of the turns' ratios (new to old), and its spread."""

    old_ms: float
    new_ms: float
    ratio: float
    quartiles: tuple[float, float]
    same_losses: bool


def compare_commits(case: str, commit: str, pairs: int, threads: int) -> Compared:
    """A case's steps in `pairs` turns of either tree, after one to warm up."""
    with ExitStack() as stack:
        trees = (stack.enter_context(tree_of(commit)), HERE)
        runs = [stack.enter_context(_running(tree, CASES[case], threads)) for tree in trees]
        turns = [[run.turn() for run in runs] for _ in range(pairs + 1)][1:]
        losses = [[record["loss"] for record in run.records()] for run in runs]
    old, new = (statistics.median(side) for side in zip(*turns, strict=True))
    ratios = [after / before for before, after in turns]
    first, middle, third = statistics.quantiles(ratios, n=4)
    same = all(a == b for a, b in zip(*losses, strict=False))
    return Compared(old, new, middle, (first, third), same)


class _Run:
    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self._process, self._output = process, folder / "output.txt"
        self._metrics = folder / "run" / "metrics.jsonl"

    def records(self) -> list[dict[str, float]]:
        """Of the training steps so far; a line may just be being written."""
        if not self._metrics.exists():
            return []
        text = self._metrics.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [record for record in found if record["kind"] == "train"]

    def turn(self) -> float:
        """Let it run for some steps; the median of their times in ms."""
        before = len(self.records())
        os.killpg(self._process.pid, signal.SIGCONT)
        deadline = time.monotonic() + _LOST_S
        while len(records := self.records()) < before + TURN:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    "a run ended, or stands still:\n" + self._output.read_text()[-2000:]
                )
            time.sleep(0.01)
        os.killpg(self._process.pid, signal.SIGSTOP)
        counted = records[before + 1 : before + TURN]
        return statistics.median(record["step_ms"] for record in counted)


@contextmanager
def _running(tree: Path, words: list[str], threads: int) -> Iterator[_Run]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatron_hybrid.cli", "pretrain", *words, *_COMMON]
        environment = os.environ | {
            "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        with Path(folder, "output.txt").open("wb") as output:
            process = subprocess.Popen(
                [*command, f"run_dir={folder}/run"], env=environment, cwd=folder, stdout=output,
                stderr=output, start_new_session=True, preexec_fn=_end_with_us,
            )  # fmt: skip
            try:
                yield _Run(process, Path(folder))
            finally:
                with suppress(ProcessLookupError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _end_with_us() -> None:
    """In a new run: one that is stopped would not notice that the benchmark was killed."""
    end_with_parent(signal.SIGKILL)
