"""Distillation on the CPU: the divergence beside its plain formulation, live and cached steps.

    python benchmarks/distillation.py kl --tokens 2048 --tensor-parallel 1 2
    python benchmarks/distillation.py step --rounds 10
    python benchmarks/distillation.py cache --rounds 10

`kl`: forward and backward of KL(teacher, student) of bf16 logits. The plain one makes both logits
fp32 and lets autograd keep what it will; over TP it reduces largest logits and denominators as it
must. `step`: a step of distillation beside a step of pre-training and a forward pass of the
teacher. `cache`: a step from cached top-64 logits beside one of pre-training, and reading these
beside fetching tokens. Sides take turns, and medians count; memory is what a side adds to the
process's peak.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distillation_cache import SAMPLES, build_stepper, compare_cached, medians, train_once
from ssd_core import peak_resident_mib
from torch import Tensor

from megatron_hybrid.testing import run_distributed


class _Sum(torch.autograd.Function):
    """Over TP. Backward: of what every rank has a part of the loss from (`parts`), the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, parts: bool) -> Tensor:
        ctx.parts, total = parts, value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.parts:
            grad = grad.clone()
            dist.all_reduce(grad)
        return grad, None


def _log_softmax(logits: Tensor) -> Tensor:
    if dist.get_world_size() == 1:
        return logits.float().log_softmax(-1)
    wide = logits.float()
    largest = wide.detach().amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    wide = wide - largest
    return wide - _Sum.apply(wide.exp().sum(-1, keepdim=True), True).log()


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """By its definition in fp32, `[s, b]`."""
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)
    return _Sum.apply((log_p.exp() * (log_p - log_q)).sum(-1), False)  # type: ignore[no-any-return]


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The objective's, which finds both cross-entropies and the agreement on the way."""
    from megatron_hybrid.layers.kl_divergence import vocab_parallel_divergence

    group = dist.group.WORLD
    assert group is not None
    return vocab_parallel_divergence(student, teacher, labels, group).divergence


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "ours": ours}


def inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's parts of both logits, bf16, and labels."""
    torch.manual_seed(dist.get_rank())
    shape = (tokens, 1, vocabulary // dist.get_world_size())
    student, teacher = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.randint(0, vocabulary, (tokens, 1), generator=torch.Generator().manual_seed(1))
    return student, teacher, labels


def both_passes(
    side: str, student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[float, Tensor]:
    """The sum over tokens and its gradient, which may take the place of the student's logits."""
    loss = SIDES[side](student.view_as(student), teacher, labels).sum()
    # Not into a `.grad`, which would be a copy.
    (grad,) = torch.autograd.grad(loss, student)
    return float(loss.detach()), grad


def memory(tokens: int, vocabulary: int, side: str, threads: int) -> float:
    """On a rank: what a side adds to the peak of a fresh process, in MiB."""
    torch.set_num_threads(threads)
    warm = inputs(8, vocabulary)
    both_passes(side, warm[0].requires_grad_(), *warm[1:])
    student, *others = inputs(tokens, vocabulary)
    student.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak_resident_mib()
    both_passes(side, student, *others)
    return peak_resident_mib() - before


def compare_divergence(tokens: int, vocabulary: int, rounds: int, threads: int) -> dict[str, float]:
    """On a rank: seconds of both sides, in turns."""
    torch.set_num_threads(threads)
    student, teacher, labels = inputs(tokens, vocabulary)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        found = {}
        for name in SIDES:
            logits = student.clone().requires_grad_()
            start = time.perf_counter()
            loss, grad = both_passes(name, logits, teacher, labels)
            if number:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
            found[name] = loss, grad[:64].float()
            del logits, grad
        (one, its), (other, others) = found.values()
        assert abs(one - other) <= 1e-4 * abs(one), "the sides come to other values"
        assert (its - others).norm() <= 1e-2 * its.norm(), "the sides come to other gradients"
    return {name: statistics.median(each) for name, each in seconds.items()}


def words(folder: Path, length: int, width: int) -> list[str]:
    """A run of a model of some hidden size; of 512 it has 33M parameters, as `train_step.py`'s."""
    return [
        "model.hybrid_layer_pattern=M-M-M*-M-M*-M-M-", f"model.hidden_size={width}",
        f"model.ffn_hidden_size={3 * width}", "model.num_attention_heads=8",
        "model.num_query_groups=2", f"model.kv_channels={width // 8}", "model.mamba_num_heads=16",
        f"model.mamba_head_dim={width // 8}", "model.mamba_state_dim=64",
        "model.mamba_num_groups=1", "model.vocab_size=8192", f"run_dir={folder}",
        "data.mock_data=true", "data.tokenizer_type=null", f"data.seq_length={length}",
        "training.train_iters=1", "training.global_batch_size=2", "optimizer.lr=1e-3",
        "precision.recipe=fp32", "backend=torch", "logging.tensorboard=false",
        "data.num_workers=0",
    ]  # fmt: skip


def compare_steps(
    folder: Path, length: int, width: int, rounds: int, threads: int
) -> dict[str, float]:
    """On a rank: seconds of a step of either objective, and of the teacher's forward passes."""
    from megatron_hybrid.config import load_config
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups
    from megatron_hybrid.training.step import BatchShape

    torch.set_num_threads(threads)
    train_once(load_config(words(folder, length, width)))
    half = words(folder, length, width // 2)
    taught = [f"training.objective_options.teacher={folder}", "training.objective=distillation"]
    student, learner = load_config(half), load_config([*half, *taught])
    draws = torch.Generator().manual_seed(0)
    batches = []
    for number in range(2):
        tokens = torch.randint(0, 8192, (1, length + 1), generator=draws)
        batches.append(
            Batch(
                tokens[:, :-1], tokens[:, 1:], torch.ones(1, length), torch.arange(length)[None],
                samples=(number,),
            )
        )  # fmt: skip
    with model_parallel_groups(student, initialize()):
        shape = BatchShape(2, length)
        plain_step, live_step = build_stepper(student), build_stepper(learner)
        teacher: Any = live_step.objective.sources[0]  # type: ignore[attr-defined]

        def forward() -> None:
            teacher.look_ahead(batches, held_out=True)
            for batch in batches:
                teacher.answer(batch.samples)

        sides: dict[str, Callable[[], object]] = {
            "pre-training": lambda: plain_step.train(iter(batches), shape, float("inf"), []),
            "teacher's forward": forward,
            "live": lambda: live_step.train(iter(batches), shape, float("inf"), []),
        }
        return medians(sides, rounds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kl", "step", "cache"))
    parser.add_argument("--tokens", type=int, default=2048, help="of the divergence")
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a step's samples")
    parser.add_argument("--width", type=int, default=512, help="hidden size of a step's teacher")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a rank")
    args = parser.parse_args(argv)
    if args.what == "step":
        with tempfile.TemporaryDirectory() as folder:
            (found,) = run_distributed(
                compare_steps, 1, Path(folder) / "run", args.length, args.width, args.rounds,
                args.threads, timeout_s=3600,
            )  # fmt: skip
        apart = found["pre-training"] + found["teacher's forward"]
        row = {"seconds": found, "live / (pre-training + forward)": found["live"] / apart}
        print(json.dumps(row), flush=True)
        return
    if args.what == "cache":
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (found,) = run_distributed(
                compare_cached, 1, folder, words(folder / "run", args.length, args.width),
                words(folder / "half", args.length, args.width // 2), args.rounds, args.threads,
                timeout_s=3600,
            )  # fmt: skip
        tokens = SAMPLES * args.length
        row = {
            "seconds": found,
            "tokens/s": {name: tokens / each for name, each in found.items()},
            "cached / pre-training": found["cached"] / found["pre-training"],
            "read / pre-training, tokens/s": found["pre-training"] / found["read"],
        }
        print(json.dumps(row), flush=True)
        return
    for ranks in args.tensor_parallel:
        size = (args.tokens, args.vocabulary)
        timed = run_distributed(
            compare_divergence, ranks, *size, args.rounds, args.threads, timeout_s=3600
        )
        seconds = {name: max(rank[name] for rank in timed) for name in SIDES}
        peaks = {
            name: max(run_distributed(memory, ranks, *size, name, args.threads, timeout_s=3600))
            for name in SIDES
        }
        row = {
            "TP": ranks, "tokens": args.tokens, "vocabulary": args.vocabulary,
            "logits MiB": 2 * 2 * args.tokens * args.vocabulary / ranks / 2**20,
            "seconds": seconds, "MiB": peaks,
            "time": seconds["ours"] / seconds["plain"],
            "memory": peaks["ours"] / peaks["plain"],
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
