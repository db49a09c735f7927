"""What a checkpoint holds beside the optimizer, and how the engine lays out its tensors."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_hybrid.errors import UserError
from megatron_hybrid.model.tensor_names import NO_WEIGHTS, OBJECTIVE, VOCABULARY_WEIGHTS

_EXTRA_STATE = "._extra_state"

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


def without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    """A chunk's sharded state without what the engine's modules keep beside their weights.

    Nothing of it is needed: it is empty but for Transformer Engine's delayed scaling, which
    `config/rules/precision.py` refuses. Which modules have one, and in which form, differs between
    backends and between releases of Transformer Engine, which refuses most that are not empty.

    Args:
        state: of one chunk, as `model_state` has it.
    """
    return {
        name: entry
        for name, entry in state.items()
        if not (isinstance(entry, ShardedObject) and entry.key.endswith(_EXTRA_STATE))
    }


def load_chunk(chunk: torch.nn.Module, loaded: dict[str, Any]) -> None:
    """Put tensors into a chunk: all it has, but for extra states and what `take_out_new` has taken
    out, which stay as they were made."""
    missing, unexpected = chunk.load_state_dict(loaded, strict=False)
    missing = [n for n in missing if not (n.endswith(_EXTRA_STATE) or n.startswith(OBJECTIVE))]
    assert not missing and not unexpected, (missing, unexpected)


def take_out_new(state: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Take out of what is asked of a checkpoint what the objective trains and the checkpoint has
    not, or of another shape: it starts as it is made. All ranks call it together.

    Args:
        state: the sharded state of this rank's chunks.
        present: the checkpoint's sharded metadata.

    Returns:
        The names of such, on any rank.
    """
    new = set()
    for chunk in state.values():
        for name in [each for each in chunk if each.startswith(OBJECTIVE)]:
            wanted = chunk[name]
            there = present.get(wanted.key)
            if there is None or tuple(there.global_shape) != tuple(wanted.global_shape):
                new.add(wanted.key)
                del chunk[name]
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, new)
    return sorted(set().union(*everywhere))


def refuse_fewer_words(present: dict[str, Any], words: int) -> None:
    """Refuse a checkpoint without a row for every word, which the engine would fill with zeros.

    Args:
        present: the checkpoint's sharded metadata.
        words: `model.vocab_size`.

    Raises:
        UserError: naming what is too short.
    """
    for key in VOCABULARY_WEIGHTS:
        rows = present[key].global_shape[0] if key in present else words
        if rows < words:
            raise UserError(f"{key} has {rows} rows, fewer than model.vocab_size={words}")


def refuse_left_over(present: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse a checkpoint with weights that the model has not, as those of more layers.

    The engine passes over them. All ranks call it together.

    Args:
        present: the checkpoint's sharded metadata.
        asked: the sharded state of this rank's chunks.

    Raises:
        UserError: naming some.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {tensor.key for tensor in _asked(asked)})
    left = {
        entry.key
        for entry in present.values()
        if isinstance(entry, ShardedTensor) and not any(part in entry.key for part in NO_WEIGHTS)
    }.difference(*everywhere)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UserError(
            f"it holds another model, with {', '.join(sorted(left)[:3])}{more}, which are no "
            "weights of this one"
        )


def _asked(state: Any) -> Iterator[ShardedTensor]:
    """All tensors of a sharded state, those that a part of it becomes when it is read, too."""
    if isinstance(state, ShardedTensorFactory):
        yield from _asked(state.build())
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for each in state.values() if isinstance(state, dict) else state:
            yield from _asked(each)


@torch.no_grad()
def clear_padding(state: dict[Any, Any], loaded: dict[Any, Any], words: int) -> None:
    """Make rows of the vocabulary's matrices that stand for no word 0, also in the optimizer.

    They would take part in no loss, but in the norm of the parameters; and a checkpoint may have
    been trained where they took part in it, or hold words there that this model has not.

    Args:
        state: the sharded state that was asked for.
        loaded: the tensors in its places.
        words: `model.vocab_size`.
    """
    for wanted, tensor in _tensors(state, loaded):
        if wanted.key.endswith(VOCABULARY_WEIGHTS):
            tensor[max(words - wanted.global_offset[0], 0) :] = 0.0


def _tensors(state: Any, loaded: Any) -> Iterator[tuple[ShardedTensor, Tensor]]:
    """What was asked for, and what came of it, in dictionaries of dictionaries."""
    if isinstance(state, ShardedTensor):
        yield state, loaded
    elif isinstance(state, dict) and isinstance(loaded, dict):
        for key in state.keys() & loaded.keys():
            yield from _tensors(state[key], loaded[key])


def rng_state() -> ShardedObject:
    """The generators' states of this pipeline and tensor rank, and of which kind of device."""
    states = {
        "device": _device_kind(),
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
    shapes = {
        tuple(entry.global_shape)
        for entry in present.values()
        if isinstance(entry, ShardedObject) and entry.key == "rng_state"
    }
    same = rng_state().global_shape in shapes
    if not same and dist.get_rank() == 0:
        why = "another layout saved it" if shapes else "it holds no states of random generators"
        logger.info("%s: random generators start from the seed", why)
    return same


def set_rng_state(states: dict[str, Any]) -> None:
    """Take up what `rng_state` saved, unless generators of another kind of device wrote it.

    The CPU's have 5056 bytes, a GPU's 16: none of either can go on with the other's.
    """
    # Earlier checkpoints do not say what they are of, but have a state of CUDA's or none.
    saved_on = states.get("device", "cpu" if states["cuda"] is None else "cuda")
    if saved_on != _device_kind():
        if dist.get_rank() == 0:
            logger.warning(
                "it was saved on %s, and this run is on %s: random generators start from the seed",
                saved_on, _device_kind(),
            )  # fmt: skip
        return
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
