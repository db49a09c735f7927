"""Is a pipeline faster when the planner cuts the pattern? PP2 on two cores, ten patterns.

    python benchmarks/pipeline_balance.py

For each pattern the layers are timed on this machine, then the pattern cut in the middle and as the
planner cuts it are trained in turns by the same two ranks. Ends with 1 if the planner's cut is
slower by more than the runs spread, or not faster where it promises more than 10 %.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.config import RunConfig, build_config
from megatron_hybrid.testing import run_distributed

SEQ_LENGTH, MICRO_BATCHES, VOCAB_SIZE = 512, 8, 4096
RUNS, STEPS = 5, 2
SMALL, LARGE = 1024, 16384  # vocabularies
# Pattern and vocabulary; what is dear lies at one end, or in the output layer.
CASES = (
    ("MMMM----", SMALL), ("----MMMM", SMALL), ("EEEE****", SMALL), ("MMMMMM****", SMALL),
    ("-*-*-*-*MMEE", SMALL), ("M-M-M-M-", LARGE), ("MMMM----", LARGE), ("********MMMM", SMALL),
    ("EE--MM**--", SMALL), ("M*M*M*------", LARGE),
)  # fmt: skip


def run_config(pattern: str, vocabulary: int) -> RunConfig:
    """A run of a pattern over two stages."""
    moe = {"num_moe_experts": 4, "moe_ffn_hidden_size": 512} if "E" in pattern else {}
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": pattern, "hidden_size": 256, "ffn_hidden_size": 1024,
                "num_attention_heads": 4, "mamba_head_dim": 32, "mamba_state_dim": 32,
                "mamba_num_groups": 1, "vocab_size": vocabulary, **moe,
            },
            "parallel": {"pipeline_model_parallel_size": 2},
            "precision": {"recipe": "fp32"},
            "data": {"mock_data": True, "tokenizer_type": "null", "seq_length": SEQ_LENGTH},
            "training": {"train_iters": 1000, "global_batch_size": MICRO_BATCHES},
            "optimizer": {"lr": 1e-4, "lr_decay_style": "constant"},
        },
        world_size=2,
        has_cuda=False,
    )  # fmt: skip


def measured(config: RunConfig) -> dict[str, Any]:
    """On both ranks at once, as they will compute: the costs of the layers."""
    from megatron_hybrid.planner.costs import costs_json
    from megatron_hybrid.planner.measure import measure_costs, one_rank
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    single = one_rank(config, config.model.hybrid_layer_pattern.replace("|", ""))
    with model_parallel_groups(single, initialize()):
        costs: dict[str, Any] = json.loads(costs_json(measure_costs(single)))
        return costs


@contextmanager
def trained(configs: list[RunConfig]) -> Iterator[list[Callable[[], float]]]:
    """On a rank: a function for each config that trains a step, and returns its loss."""
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups
    from megatron_hybrid.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_hybrid.training.step import BatchShape, Stepper

    platform = initialize()
    tokens = torch.randint(
        0, SMALL, (1, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], torch.ones(1, SEQ_LENGTH), torch.arange(SEQ_LENGTH)[None]
    )
    shape = BatchShape(MICRO_BATCHES, SEQ_LENGTH)
    with model_parallel_groups(configs[0], platform):
        steppers = []
        for config in configs:
            engine_config = transformer_config(config, "torch", platform.device)
            chunks = build_model_chunks(config, engine_config, "torch")
            model = wrap_data_parallel(config, engine_config, chunks)
            optimizer = build_optimizer(config, engine_config, model)
            steppers.append(Stepper(config, model, optimizer, "torch", platform.device))

        def step(stepper: Stepper) -> float:
            return stepper.train(itertools.repeat(batch), shape, float("inf"), []).loss

        yield [lambda s=s: step(s) for s in steppers]  # type: ignore[misc]


def timed(configs: list[RunConfig]) -> list[list[float]]:
    """On a rank: seconds a step of each config, in turns."""
    seconds: list[list[float]] = [[] for _ in configs]
    with trained(configs) as steps:
        for step in steps:
            step()
        for _ in range(RUNS):
            for step, found in zip(steps, seconds, strict=True):
                torch.distributed.barrier()
                start = time.perf_counter()
                for _ in range(STEPS):
                    step()
                torch.distributed.barrier()
                found.append((time.perf_counter() - start) / STEPS)
    return seconds


def compared(pattern: str, vocabulary: int, folder: Path) -> dict[str, Any]:
    """One case: cuts, predicted and measured gain, and whether they agree."""
    from megatron_hybrid.planner.balance import Balancer
    from megatron_hybrid.planner.costs import read_costs

    half = len(pattern) // 2
    config = run_config(f"{pattern[:half]}|{pattern[half:]}", vocabulary)
    path = folder / "costs.json"
    path.write_text(json.dumps(run_distributed(measured, 2, config)[0]))
    balancer = Balancer(pattern, read_costs(path, pattern), 2, 1, MICRO_BATCHES)
    even, best = balancer.timed((pattern[:half], pattern[half:])), balancer.best()
    configs = [run_config(split.pattern, vocabulary) for split in (even, best)]
    seconds = run_distributed(timed, 2, configs, timeout_s=600)[0]
    middle = [statistics.median(each) for each in seconds]
    spread = max((max(each) - min(each)) / min(each) for each in seconds)
    predicted, gain = even.step_ms / best.step_ms - 1, middle[0] / middle[1] - 1
    good = gain >= -spread and (predicted <= 0.10 or gain > 0)
    return {
        "even": even.pattern, "balanced": best.pattern, "vocab_size": vocabulary,
        "even_s": middle[0], "balanced_s": middle[1], "spread": spread,
        "predicted_gain": predicted, "measured_gain": gain, "good": good,
    }  # fmt: skip


def main() -> int:
    """Compare all cases and print the table."""
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    arguments = parser.parse_args()
    found = []
    print(f"{'even':15} {'balanced':15} {'vocab':>6} {'even s':>7} {'bal. s':>7} "
          f"{'predicted':>9} {'measured':>9} {'spread':>7}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for pattern, vocabulary in CASES[: arguments.cases]:
            case = compared(pattern, vocabulary, Path(folder))
            found.append(case)
            print(
                f"{case['even']:15} {case['balanced']:15} {vocabulary:6} {case['even_s']:7.3f} "
                f"{case['balanced_s']:7.3f} {case['predicted_gain']:9.1%} "
                f"{case['measured_gain']:9.1%} {case['spread']:7.1%} "
                f"{'' if case['good'] else 'NOT AS PROMISED'}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if all(case["good"] for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())
