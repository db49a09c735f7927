"""Emulated float8 in a built model: which linears it is in, and its state over ranks and steps."""

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.hybrid.hybrid_block import HybridStack
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.precision import FLOAT8_RECIPES, float8_layers
from megatron_hybrid.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    WholeLinear,
    parallel_linear,
)
from megatron_hybrid.ops.float8 import ROLES, Float8Linear

CHECKPOINT_KEY = "float8_history"


def emulate_float8(config: RunConfig, chunk: torch.nn.Module, device: torch.device) -> None:
    """Give the linears of a chunk that the recipe puts in float8 their products there.

    Embedding, output layer and router stay as they are. The experts of a layer share what delayed
    scaling remembers, so that it does not depend on which rank has which expert.
    """
    if not config.precision.emulate:
        return
    recipe, numbers = FLOAT8_RECIPES[config.precision.recipe], float8_layers(config)
    for stack in chunk.modules():
        if not isinstance(stack, HybridStack):
            continue
        for layer in stack.layers:
            shared: dict[str, Float8Linear] = {}
            for name, module in layer.named_modules():
                if layer.layer_number in numbers and isinstance(
                    module, ColumnParallelLinear | RowParallelLinear | WholeLinear
                ):
                    name = re.sub(r"local_experts\.\d+\.", "experts.", name)
                    float8 = shared.setdefault(name, Float8Linear(recipe, device))
                    module._forward_impl = partial(parallel_linear, product=float8)
                    module.float8 = (f"{layer.layer_number}.{name}", float8)


def float8_linears(chunks: Sequence[torch.nn.Module]) -> dict[str, Float8Linear]:
    """This rank's linears in emulated float8, by layer number and name ("3.mixer.in_proj")."""
    found = (getattr(module, "float8", None) for chunk in chunks for module in chunk.modules())
    return dict(sorted(each for each in found if each is not None))


def end_step(linears: dict[str, Float8Linear]) -> None:
    """Delayed scaling: all ranks that share a stage's tensors agree on what this step saw.

    All ranks call it together. Transformer Engine does so after each pass of a micro batch; here
    a history has an entry a step.
    """
    delayed = [linear for linear in linears.values() if linear.history]
    if not delayed:
        return
    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    seen = torch.stack([linear.latest[role] for linear in delayed for role in ROLES])
    dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    values = iter(seen.unbind())
    for linear in delayed:
        linear.latest = {role: next(values) for role in ROLES}
        linear.end_step()


def histories(linears: dict[str, Float8Linear]) -> dict[str, ShardedTensor]:
    """Delayed scaling's memory for a checkpoint: `[3, AMAX_HISTORY]` a linear, in any layout."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return {
        f"{CHECKPOINT_KEY}.{name}": ShardedTensor.from_rank_offsets(
            f"{CHECKPOINT_KEY}.{name}", _stacked(linear), replica_id=(0, *ranks)
        )
        for name, linear in linears.items()
        if linear.history
    }


def set_histories(linears: dict[str, Float8Linear], loaded: dict[str, Tensor]) -> None:
    """Take up what `histories` saved."""
    for key, rows in loaded.items():
        linear = linears[key.removeprefix(f"{CHECKPOINT_KEY}.")]
        linear.history = dict(zip(ROLES, rows.unbind(), strict=True))


def _stacked(linear: Float8Linear) -> Tensor:
    return torch.stack([linear.history[role] for role in ROLES])
