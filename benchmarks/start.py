"""CPU seconds of a start: of a command, of a rank, of a rank forked in a test, and of torch alone.

    python benchmarks/start.py --against HEAD~1    # this tree's code beside a commit's, in turns

CPU seconds, user's and the system's, of the process and its children: how long a start takes on a
machine that has nothing else to do. Medians of the turns, and the median of the turns' ratios.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "megatron_hybrid.cli"]
# One step of a model that is nearly nothing; what remains is the start.
RUN = [
    "model.hybrid_layer_pattern=M*-", "model.hidden_size=32", "model.num_attention_heads=2",
    "model.mamba_head_dim=16", "model.mamba_state_dim=8", "model.mamba_num_groups=2",
    "model.vocab_size=64", "model.make_vocab_size_divisible_by=32", "data.mock_data=true",
    "data.tokenizer_type=null", "data.seq_length=32", "data.num_workers=0",
    "precision.recipe=fp32", "training.global_batch_size=1", "training.train_iters=1",
    "optimizer.lr=1e-3", "optimizer.lr_decay_style=constant",
]  # fmt: skip
# What a rank forked by `run_distributed` has spent once it has an optimizer.
FORKED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from start_rank import spent
from megatron_hybrid.testing import run_distributed
print(run_distributed(spent, 1)[0])
"""
RANK = """
import time
def spent():
    import torch
    from megatron_hybrid.platform.adam import Adam
    from megatron_hybrid.training import trainer
    Adam([torch.zeros(1, requires_grad=True)])
    return time.process_time()
"""
RANKS = "pretrain --nproc 4, one step"
CASES = ("import torch", "--help", "pretrain, one step", RANKS, "a forked rank")


def cpu_s(words: list[str], tree: Path) -> tuple[float, str]:
    """CPU seconds of a command on the code of a tree, its children's included; its output."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{output}")
    return usage.ru_utime + usage.ru_stime, output


def measured(case: str, tree: Path) -> float:
    """CPU seconds of one start."""
    with tempfile.TemporaryDirectory() as folder:
        if case == "import torch":
            return cpu_s([sys.executable, "-c", "import torch"], tree)[0]
        if case == "--help":
            return cpu_s([*CLI, "--help"], tree)[0]
        if case == "pretrain, one step":
            return cpu_s([*CLI, "pretrain", *RUN, f"run_dir={folder}/run"], tree)[0]
        if case == RANKS:
            more = ["--nproc", "4", "training.global_batch_size=4", f"run_dir={folder}/run"]
            return cpu_s([*CLI, "pretrain", *RUN, *more], tree)[0]
        Path(folder, "start_rank.py").write_text(RANK)
        return float(cpu_s([sys.executable, "-c", FORKED, folder], tree)[1].split()[-1])


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """The code of a commit of this repository, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["git", "-C", str(HERE), "archive", commit]
        archive = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", default="HEAD~1", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    arguments = parser.parse_args()
    print(f"| CPU seconds | {arguments.against} | this tree | ratio |\n|---|---|---|---|")
    with tree_of(arguments.against) as before:
        for case in arguments.cases:
            for tree in (before, HERE):  # bytecode and page cache are no part of a start
                measured(case, tree)
            turns = [
                (measured(case, before), measured(case, HERE)) for _ in range(arguments.rounds)
            ]
            old, new = (statistics.median(side) for side in zip(*turns, strict=True))
            ratio = statistics.median(now / then for then, now in turns)
            print(f"| {case} | {old:.2f} | {new:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
