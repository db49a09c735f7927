"""What a checkpoint holds beside the optimizer, and how the engine lays out its tensors."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model

logger = logging.getLogger(__name__)


def tensor_layout() -> dict[str, Any]:
    """How the engine lays out the tensors: an optimizer state that any layout can load."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_state(model: list[torch.nn.Module], metadata: dict) -> dict[str, Any]:
    """The sharded state of this rank's chunks, under the keys of the bare model."""
    chunks = unwrap_model(model)
    names = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
    return {
        name: chunk.sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, chunks, strict=True)
    }


def rng_state() -> ShardedObject:
    """The generators' states of this pipeline and tensor rank."""
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    shape = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", states, shape, place, replica_id=replica)


def same_grid(present: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved by as many pipeline and tensor ranks as there are now.

    Generators belong to ranks: in another layout they start from the seed.

    Args:
        present: the checkpoint's sharded metadata.
    """
    shape = rng_state().global_shape
    same = any(
        isinstance(entry, ShardedObject)
        and entry.key == "rng_state"
        and tuple(entry.global_shape) == shape
        for entry in present.values()
    )
    if not same and dist.get_rank() == 0:
        logger.info("another layout saved it: random generators start from the seed")
    return same


def set_rng_state(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
