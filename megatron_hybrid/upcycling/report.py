"""What an upcycling would do, in numbers, before it does anything."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_hybrid.checkpoint.progress import ahead
from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.config.layers import layers_of
from megatron_hybrid.config.pattern import MLP, parse_pattern
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.upcycling.write import Upcycling

# Bytes a parameter: weight, fp32 gradient, and the optimizer's fp32 weight and two moments. In fp32
# the weight is the optimizer's.
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_TRAINING_BYTES = {"bf16": 2 + 4 + 12, "fp32": 4 + 4 + 8}
_GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """A model before or after.

    Attributes:
        active: parameters that one token passes through.
        weights_gib: of a checkpoint without an optimizer's state.
        training_gib: weights, gradients and optimizer, over all ranks, each once.
    """

    total: int
    active: int
    weights_gib: float
    training_gib: float


def sizes(config: RunConfig) -> Sizes:
    """The sizes of a config's model."""
    counts, recipe = count_parameters(config.model), config.precision.weights
    return Sizes(
        counts.total,
        counts.active,
        counts.total * _WEIGHT_BYTES[recipe] / _GIB,
        counts.total * _TRAINING_BYTES[recipe] / _GIB,
    )


def matrix_gib(model: ModelConfig, itemsize: int) -> float:
    """The largest matrix of an MLP: what upcycling holds in memory beside a constant."""
    rows = max(
        (2 if layer.model.activation == "swiglu" else 1) * (layer.model.ffn_hidden_size or 0)
        for layer in layers_of(model, MLP)
    )
    return rows * model.hidden_size * itemsize / _GIB


def print_report(
    dense: RunConfig, config: RunConfig, upcycling: Upcycling, console: Console
) -> None:
    """Layers, experts, scale, both models beside each other, and what the run has before it."""
    scheme = upcycling.scheme
    before, after = (parse_pattern(c.model.hybrid_layer_pattern).layers for c in (dense, config))
    router = "softmax, then top-k" if config.model.moe_router_pre_softmax else "top-k, then softmax"
    if config.model.moe_router_score_function == "sigmoid":
        router = "sigmoid"
    shared = f", {scheme.shared_shards} of them shared" if scheme.shared_shards else ""
    lines = {
        "pattern": f"{before} -> {after}",
        "layers": ", ".join(str(number + 1) for number in scheme.layers),
        "experts": f"{scheme.num_experts} of {scheme.width} channels: {scheme.expansion} copies of "
        f"an MLP of {scheme.channels}, cut into {scheme.granularity}{shared}",
        "router": f"{scheme.topk} experts a token; {router}",
        "scale": f"{scheme.scale:.4f} on both matrices of each routed expert",
        "training": ahead(config, upcycling.progress),
    }
    for name, text in lines.items():
        console.print(f"{name:8}  {text}", highlight=False, markup=False, soft_wrap=True)
    table = Table("model")
    for title in ("parameters", "active a token", "weights GiB", "training state GiB"):
        table.add_column(title, justify="right")
    for name, c in (("dense", dense), ("upcycled", config)):
        size = sizes(c)
        table.add_row(
            name, f"{size.total:,}", f"{size.active:,}",
            f"{size.weights_gib:.2f}", f"{size.training_gib:.2f}",
        )  # fmt: skip
    console.print(table)
    itemsize = _WEIGHT_BYTES[dense.precision.weights]
    console.print(
        f"to write: {sizes(config).total * itemsize / _GIB:.2f} GiB; in memory beside Python and "
        f"torch, one matrix of an MLP: {matrix_gib(dense.model, itemsize):.3f} GiB",
        highlight=False,
        soft_wrap=True,
    )
