"""A training step of ours beside megatron-core's own hybrid specs, on one GPU, in one process.

A model of the same sizes, tokens and optimizer on both sides, which take turns. Weights are drawn
apart, and the engine's `A_log`, `dt_bias` and `D` are in bf16, where ours stay in fp32: losses are
close, not equal (docs/numerics.md). Not run on a GPU yet; with
`--device cpu` our side alone runs, which shows that the program does.

    python benchmarks/gpu_step.py --peak-tflops 989 --json gpu_step.json
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Chosen before torch is imported.
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
parser.add_argument("--recipe", default="bf16", help="of precision.recipe")
parser.add_argument("--micro-batch-size", type=int, default=2)
parser.add_argument("--seq-length", type=int, default=4096)
parser.add_argument("--layers", default="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-", help="the pattern")
parser.add_argument("--hidden-size", type=int, default=1024)
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--peak-tflops", type=float, help="of the device in bf16, for MFU")
parser.add_argument("--json", type=Path, help="write the figures there as well")
ARGS = parser.parse_args()
if ARGS.device == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_hybrid.config import RunConfig, load_config  # noqa: E402
from megatron_hybrid.data.batch import Batch  # noqa: E402
from megatron_hybrid.model.counts import flops_per_token  # noqa: E402
from megatron_hybrid.platform import initialize  # noqa: E402

VOCABULARY = 65536
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Medians of one side; `mfu` is model FLOPs over the device's peak, None without a peak."""

    step_ms: float
    tokens_per_s: float
    mfu: float | None
    first_loss: float


def config_of(args: argparse.Namespace) -> RunConfig:
    hidden = args.hidden_size
    return load_config(
        [
            f"model.hybrid_layer_pattern={args.layers}", f"model.hidden_size={hidden}",
            f"model.num_attention_heads={hidden // 64}",
            f"model.num_query_groups={hidden // 128}", f"model.ffn_hidden_size={4 * hidden}",
            "model.mamba_head_dim=64", "model.mamba_state_dim=128",
            f"model.mamba_num_groups={hidden // 128}", f"model.vocab_size={VOCABULARY}",
            "data.mock_data=true", "data.tokenizer_type=null",
            f"data.seq_length={args.seq_length}", f"precision.recipe={args.recipe}",
            f"training.micro_batch_size={args.micro_batch_size}",
            f"training.global_batch_size={args.micro_batch_size}", "training.train_iters=1",
            "optimizer.lr=1e-4",
        ],
        world_size=1,
        has_cuda=args.device == "cuda",
    )  # fmt: skip


def batches(config: RunConfig) -> Iterator[Batch]:
    """The same random tokens for ever."""
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
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

        builder.hybrid_stack_spec = lambda _: hybrid_stack_spec
    try:
        torch.manual_seed(1)
        chunks = builder.build_model_chunks(config, engine_config, backend)
    finally:
        builder.hybrid_stack_spec = ours
    model = wrap_data_parallel(config, engine_config, chunks)
    optimizer = build_optimizer(config, engine_config, model)
    return Stepper(config, model, optimizer, backend, device)


def compare(args: argparse.Namespace) -> dict[str, Measured]:
    """Each side's medians over `args.rounds` turns."""
    from megatron_hybrid.training.distributed import process_groups
    from megatron_hybrid.training.step import BatchShape

    config, platform = config_of(args), initialize()
    backend = "transformer_engine" if platform.has_cuda else "torch"
    shape = BatchShape(args.micro_batch_size, args.seq_length)
    with process_groups(config, platform, alone=True):
        names = ("ours", "engine") if platform.has_cuda else ("ours",)
        sides = {side: build(config, side, backend, platform.device) for side in names}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        losses: dict[str, float] = {}
        for turn in range(WARM_UP_STEPS + args.rounds):
            for side, stepper in sides.items():
                _wait(platform.device)
                start = time.perf_counter()
                result = stepper.train(batches(config), shape, math.inf, [])
                _wait(platform.device)
                if turn >= WARM_UP_STEPS:
                    seconds[side].append(time.perf_counter() - start)
                losses.setdefault(side, result.loss)
    flops = shape.tokens * flops_per_token(config.model, args.seq_length).total
    measured = {}
    for side, taken in seconds.items():
        median = statistics.median(taken)
        peak = None if args.peak_tflops is None else args.peak_tflops * 1e12
        measured[side] = Measured(
            step_ms=1e3 * median,
            tokens_per_s=shape.tokens / median,
            mfu=None if peak is None else flops / median / peak,
            first_loss=losses[side],
        )
    return measured


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    if ARGS.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu runs our side alone")
    measured = compare(ARGS)
    name = torch.cuda.get_device_name() if ARGS.device == "cuda" else "the CPU"
    table = Table(title=f"Training step on {name}, {ARGS.recipe}, {ARGS.seq_length} tokens")
    for column in ("side", "ms", "tokens/s", "MFU", "first loss"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for side, it in measured.items():
        mfu = "" if it.mfu is None else f"{it.mfu:.1%}"
        table.add_row(
            side, f"{it.step_ms:,.1f}", f"{it.tokens_per_s:,.0f}", mfu, f"{it.first_loss:.4f}"
        )
    Console().print(table)
    if ARGS.json:
        figures = {side: asdict(it) for side, it in measured.items()}
        ARGS.json.write_text(json.dumps({"device": name, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
