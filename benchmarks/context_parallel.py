"""Context parallelism of Mamba-2 layers by an all-to-all and by passing states, over gloo.

    python benchmarks/context_parallel.py --cp 2 --layers 8
    python benchmarks/context_parallel.py --cp 2 4 8 --layers 1 --rounds 1

Layers one after the other, each with its projections, forward and backward, on one sequence that
the ranks share. Both ways take turns in the same processes, and the median of their ratios counts;
bytes are counted on the process group. A rank has `--threads` threads: bytes of more ranks than
cores mean something, their seconds do not.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from megatron_hybrid.config import RunConfig, build_config
from megatron_hybrid.testing import init_model_parallel, run_distributed

WAYS = ("all_to_all", "state_passing")


@dataclass(frozen=True)
class Sizes:
    """Of the stack, in tokens, channels and layers."""

    length: int
    hidden: int
    layers: int
    state: int
    groups: int
    rounds: int
    threads: int


def config_of(sizes: Sizes, cp: int) -> RunConfig:
    """A model of such layers, in fp32."""
    return build_config(
        {
            "model": {
                "hybrid_layer_pattern": "M" * sizes.layers, "hidden_size": sizes.hidden,
                "mamba_state_dim": sizes.state, "mamba_num_groups": sizes.groups,
                "vocab_size": 256,
            },
            "parallel": {"context_parallel_size": cp},
            "precision": {"recipe": "fp32"},
            "data": {"mock_data": True, "tokenizer_type": "null", "seq_length": sizes.length},
            "training": {"global_batch_size": 1, "train_iters": 1},
            "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},
        },
        world_size=cp,
        has_cuda=False,
    )  # fmt: skip


def stack(config: RunConfig, way: str) -> nn.Sequential:
    """The layers on this rank, of the same weights whatever the way."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megatron_hybrid.model.specs import mamba_mixer_spec
    from megatron_hybrid.model.transformer_config import transformer_config

    class Residual(nn.Module):
        """A mixer whose output is added to its input."""

        def __init__(self, mixer: nn.Module) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            added: torch.Tensor = self.mixer(hidden)[0]
            return hidden + added

    torch.manual_seed(0)
    engine = transformer_config(config, "torch", torch.device("cpu"))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = mamba_mixer_spec("torch", config.model, state_passing=way == "state_passing")
    mixers = [
        build_module(
            spec, engine, d_model=config.model.hidden_size, layer_number=n + 1, pg_collection=groups
        )
        for n in range(len(config.model.hybrid_layer_pattern))
    ]
    return nn.Sequential(*(Residual(mixer) for mixer in mixers))


def measure(sizes: Sizes, cp: int) -> dict[str, list[float]]:
    """On a rank: by way, bytes that a layer sends a step, then the seconds of each round's step."""
    from megatron_hybrid.testing.traffic import Traffic

    torch.set_num_threads(sizes.threads)
    init_model_parallel(context_parallel_size=cp)
    config = config_of(sizes, cp)
    stacks = {way: stack(config, way) for way in WAYS}
    inputs = torch.randn(sizes.length // cp, 1, sizes.hidden)

    def step(way: str) -> None:
        stacks[way](inputs.clone().requires_grad_()).square().mean().backward()

    found: dict[str, list[float]] = {}
    for way in WAYS:
        with Traffic(cp) as traffic:
            step(way)
        found[way] = [traffic.sent_bytes / sizes.layers]
    for _ in range(sizes.rounds):
        for way in WAYS:
            torch.distributed.barrier()
            began = time.perf_counter()
            step(way)
            torch.distributed.barrier()
            found[way].append(time.perf_counter() - began)
    return found


def row(sizes: Sizes, cp: int) -> dict[str, Any]:
    """Medians of a layout; bytes are those of the rank that sends most."""
    ranks = run_distributed(measure, cp, sizes, cp, timeout_s=3600)
    sent = {way: max(rank[way][0] for rank in ranks) for way in WAYS}
    times = {way: ranks[0][way][1:] for way in WAYS}
    ratios = [mine / theirs for theirs, mine in zip(*times.values(), strict=True)]
    return {
        "cp": cp,
        **{f"{way} MB a layer": sent[way] / 1e6 for way in WAYS},
        "bytes, of the all-to-all's": sent["state_passing"] / sent["all_to_all"],
        **{f"{way} s": statistics.median(times[way]) for way in WAYS},
        "time, of the all-to-all's": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cp", type=int, nargs="+", default=[2])
    for name, value in (
        ("length", 16384), ("hidden", 512), ("layers", 8), ("state", 128), ("groups", 8),
        ("rounds", 5), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    words = vars(parser.parse_args())
    layouts = words.pop("cp")
    sizes = Sizes(**words)
    print(json.dumps(asdict(sizes)))
    for cp in layouts:
        print(json.dumps({k: round(v, 4) for k, v in row(sizes, cp).items()}), flush=True)


if __name__ == "__main__":
    main()
