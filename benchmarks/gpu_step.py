"""A training step of ours beside megatron-core's own hybrid specs, on one GPU, in one process.

A model of the same sizes, tokens and optimizer on both sides, which take turns. Weights are drawn
apart, and the engine's `A_log`, `dt_bias` and `D` are in bf16, where ours stay in fp32: losses are
close, not equal (docs/numerics.md). Not run on a GPU yet; with
`--device cpu` our side alone runs, which shows that the program does.

    python benchmarks/gpu_step.py --recipe fp8_tensorwise --json gpu_step.json
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_hybrid.config import RunConfig, load_config
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.model.counts import flops_per_token
from megatron_hybrid.planner.hardware import gpu_called
from megatron_hybrid.platform import initialize

WARM_UP_STEPS = 3
PROFILED_STEPS = 3
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model and its step: `layers` is the pattern, `recipe` one of precision.recipe."""

    recipe: str = "bf16"
    layers: str = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-"
    hidden_size: int = 1024
    vocab_size: int = 65536
    micro_batch_size: int = 2
    seq_length: int = 4096


@dataclass(frozen=True)
class Measured:
    """Medians of one side.

    Attributes:
        mfu: model FLOPs over the device's peak in BF16; None where that is not known.
        memory_gib: the side's model and optimizer, and the most that its step adds; None on a CPU.
        profile: milliseconds by layer kind of steps that were recorded (`training.profile`).
    """

    step_ms: float
    tokens_per_s: float
    mfu: float | None
    memory_gib: float | None
    first_loss: float
    profile: dict[str, Any]


def config_of(case: Case, *, has_cuda: bool = True) -> RunConfig:
    """The run config of a case."""
    hidden = case.hidden_size
    return load_config(
        [
            f"model.hybrid_layer_pattern={case.layers}", f"model.hidden_size={hidden}",
            f"model.num_attention_heads={hidden // 64}",
            f"model.num_query_groups={hidden // 128}", f"model.ffn_hidden_size={4 * hidden}",
            "model.mamba_head_dim=64", "model.mamba_state_dim=128",
            f"model.mamba_num_groups={hidden // 128}", f"model.vocab_size={case.vocab_size}",
            "data.mock_data=true", "data.tokenizer_type=null",
            f"data.seq_length={case.seq_length}", f"precision.recipe={case.recipe}",
            f"training.micro_batch_size={case.micro_batch_size}",
            f"training.global_batch_size={case.micro_batch_size}", "training.train_iters=1",
            "optimizer.lr=1e-4",
        ],
        world_size=1,
        has_cuda=has_cuda,
    )  # fmt: skip


def batches(config: RunConfig) -> Iterator[Batch]:
    """The same random tokens for ever."""
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    vocabulary, draws = config.model.vocab_size, torch.Generator().manual_seed(1)
    assert vocabulary is not None
    tokens = torch.randint(vocabulary, shape, generator=draws)
    positions = torch.arange(shape[1] - 1).expand(shape[0], -1)
    mask = torch.ones(shape[0], shape[1] - 1)
    while True:
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions)


def build(config: RunConfig, side: str, backend: str, device: torch.device) -> Any:
    """A Stepper of "ours" or of the "engine": its hybrid_stack_spec in place of ours."""
    from megatron_hybrid.model import build as builder
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_hybrid.training.step import Stepper

    engine_config = transformer_config(config, backend, device)
    ours = builder.hybrid_stack_spec
    if side == "engine":
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

        builder.hybrid_stack_spec = lambda *_: hybrid_stack_spec
    try:
        torch.manual_seed(1)
        chunks = builder.build_model_chunks(config, engine_config, backend)
    finally:
        builder.hybrid_stack_spec = ours
    model = wrap_data_parallel(config, engine_config, chunks)
    optimizer = build_optimizer(config, engine_config, model)
    return Stepper(config, model, optimizer, backend, device)


class Side:
    """One side of the comparison, and what its steps took."""

    def __init__(self, config: RunConfig, name: str, backend: str, device: torch.device) -> None:
        from megatron_hybrid.training.step import BatchShape

        self._on_gpu, self._device = device.type == "cuda", device
        before = self._allocated()
        self.config, self.stepper = config, build(config, name, backend, device)
        self.shape = BatchShape(config.training.global_batch_size, config.data.seq_length)
        self.losses: list[float] = []
        self.step()  # after which the optimizer has its state
        self._held = self._allocated() - before
        self.seconds: list[float] = []
        self.added = 0

    def step(self, data: Iterator[Batch] | None = None) -> float:
        """Seconds of a step."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        before, start = self._allocated(), time.perf_counter()
        result = self.stepper.train(data or batches(self.config), self.shape, math.inf, [])
        if self._on_gpu:
            torch.cuda.synchronize()
            self.added = torch.cuda.max_memory_allocated() - before
        self.losses.append(result.loss)
        return time.perf_counter() - start

    def profile(self) -> dict[str, Any]:
        """The table of time by layer kind, over steps that are not timed otherwise."""
        from megatron_hybrid.training.profile import Recording

        recording = Recording(self.config, self.stepper)
        data = recording.timed(batches(self.config))
        for _ in range(PROFILED_STEPS):
            self.step(data)
        return recording.stop(PROFILED_STEPS)

    def measured(self, peak_tflops: float | None) -> Measured:
        """The medians of `seconds`, and a profile."""
        median, memory = statistics.median(self.seconds), (self._held + self.added) / GIB
        flops = self.shape.tokens * flops_per_token(self.config.model, self.shape.seq_length).total
        return Measured(
            step_ms=1e3 * median,
            tokens_per_s=self.shape.tokens / median,
            mfu=None if peak_tflops is None else flops / median / (peak_tflops * 1e12),
            memory_gib=memory if self._on_gpu else None,
            first_loss=self.losses[0],
            profile=self.profile(),
        )

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self._on_gpu else 0


def compare(
    case: Case,
    rounds: int,
    peak_tflops: float | None = None,
    names: Sequence[str] = ("ours", "engine"),
) -> dict[str, Measured]:
    """Each side's medians over `rounds` turns."""
    from megatron_hybrid.training.distributed import process_groups

    platform = initialize()
    config = config_of(case, has_cuda=platform.has_cuda)
    backend = "transformer_engine" if platform.has_cuda else "torch"
    with process_groups(config, platform, alone=True):
        sides = {name: Side(config, name, backend, platform.device) for name in names}
        for turn in range(WARM_UP_STEPS + rounds):
            for side in sides.values():
                seconds = side.step()
                if turn >= WARM_UP_STEPS:
                    side.seconds.append(seconds)
        return {name: side.measured(peak_tflops) for name, side in sides.items()}


def device_peak_tflops() -> float | None:
    """The peak in BF16 of the GPU that is here, where the planner knows it."""
    if not torch.cuda.is_available():
        return None
    gpu = gpu_called(torch.cuda.get_device_name())
    return None if gpu is None else gpu.bf16_tflops


def _print(case: Case, measured: dict[str, Measured], device: str) -> None:
    table = Table(title=f"Training step on {device}, {case.recipe}, {case.seq_length} tokens")
    for column in ("side", "ms", "tokens/s", "MFU", "GiB", "first loss"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, it in measured.items():
        mfu = "" if it.mfu is None else f"{it.mfu:.1%}"
        memory = "" if it.memory_gib is None else f"{it.memory_gib:.1f}"
        table.add_row(
            side, f"{it.step_ms:,.1f}", f"{it.tokens_per_s:,.0f}", mfu, memory,
            f"{it.first_loss:.4f}",
        )  # fmt: skip
    Console().print(table)
    from megatron_hybrid.training.profile import as_text

    for side, it in measured.items():
        print(f"{side}, recorded steps, which are slower:\n{as_text(it.profile)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    case = Case()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--recipe", default=case.recipe, help="of precision.recipe")
    parser.add_argument("--micro-batch-size", type=int, default=case.micro_batch_size)
    parser.add_argument("--seq-length", type=int, default=case.seq_length)
    parser.add_argument("--layers", default=case.layers, help="the pattern")
    parser.add_argument("--hidden-size", type=int, default=case.hidden_size)
    parser.add_argument("--vocab-size", type=int, default=case.vocab_size)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, help="of a device that the planner has not")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before CUDA is asked for devices
    elif not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu runs our side alone")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    names = ("ours", "engine") if args.device == "cuda" else ("ours",)
    case = Case(
        args.recipe, args.layers, args.hidden_size, args.vocab_size, args.micro_batch_size,
        args.seq_length,
    )  # fmt: skip
    measured = compare(case, args.rounds, args.peak_tflops or device_peak_tflops(), names)
    _print(case, measured, device)
    if args.json:
        figures = {side: asdict(it) for side, it in measured.items()}
        args.json.write_text(json.dumps({"device": device, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
