"""What a model of either backend is: its parameters, their marks, and how it is saved."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.platform.torch_view import CPU
from tests.gpu.layers import common_name
from tests.gpu_on_cpu.device import memory, without_memory

BACKENDS = ("torch", "transformer_engine")
# Marks that the engine takes for these where a parameter has none.
DEFAULTS = {"allreduce": True, "sequence_parallel": False, "tensor_model_parallel": False}


class Description(NamedTuple):
    """Of this rank's part of a model.

    Attributes:
        parameters: by common name, shape and dtype.
        marks: by common name, the attributes by which the engine tells parameters apart.
        buffers: by name, shape and dtype.
        saved: by key of a checkpoint, each part of it: offset, whole and own shape, dtype, how it
            is cut, and which replica this rank has.
        states: keys of what modules save beside tensors.
    """

    parameters: dict[str, tuple[Any, ...]]
    marks: dict[str, dict[str, Any]]
    buffers: dict[str, tuple[Any, ...]]
    saved: dict[str, list[tuple[Any, ...]]]
    states: set[str]


def describe_all(
    lines: Sequence[list[str]], *, values: bool = False
) -> list[dict[str, Description]]:
    """On a rank of pretended GPUs: the models of command lines, each by backend.

    Args:
        values: make them with memory for their values.
    """
    with nullcontext() if values else without_memory():
        return [describe(words) for words in lines]


def describe(words: list[str]) -> dict[str, Description]:
    """The model of a command line, by backend."""
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    world_size = torch.distributed.get_world_size()
    config = load_config(words, which=rules.NO_FILES, world_size=world_size, has_cuda=True)
    with model_parallel_groups(config, initialize()):
        return {backend: _describe(config, backend) for backend in BACKENDS}


def _describe(config: RunConfig, backend: str) -> Description:
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.training.checkpoint_state import model_state, tensor_layout

    engine_config = transformer_config(config, backend, CPU)
    engine_config.perform_initialization = memory() == CPU
    (model,) = build_model_chunks(config, engine_config, backend)
    named = {common_name(name): parameter for name, parameter in model.named_parameters()}
    elsewhere = [name for name, parameter in named.items() if parameter.device != memory()]
    assert not elsewhere, f"not on the device: {elsewhere}"
    saved, states = _saved(model_state([model], tensor_layout())["model"])
    return Description(
        {name: (tuple(p.shape), p.dtype) for name, p in named.items()},
        {name: _marks(name, p) for name, p in named.items()},
        {name: (tuple(b.shape), b.dtype) for name, b in model.named_buffers()},
        saved,
        states,
    )


def _marks(name: str, parameter: torch.nn.Parameter) -> dict[str, Any]:
    marks = DEFAULTS | vars(parameter)
    if ".experts." in name:
        # That two matrices are in one of a gated expert, Transformer Engine's groups do not say.
        # Only the engine's resharding of living models asks.
        marks.pop("partition_stride", None)
    if "_latent_proj." in name:
        # Of a matrix that every rank has, Transformer Engine says it in bf16 and not in fp32.
        marks.pop("partition_dim", None)
        marks.pop("partition_stride", None)
    return marks


def _saved(state: dict[str, Any]) -> tuple[dict[str, list[tuple[Any, ...]]], set[str]]:
    """Tensors and other states of a sharded state, by key."""
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    tensors: dict[str, list[tuple[Any, ...]]] = {}
    states = set()
    left = list(state.values())
    while left:
        entry = left.pop()
        if isinstance(entry, ShardedTensorFactory):
            entry = entry.build()
        if isinstance(entry, dict | list):
            left += entry.values() if isinstance(entry, dict) else entry
        elif isinstance(entry, ShardedTensor):
            part = (
                entry.global_offset, entry.global_shape, entry.local_shape, str(entry.dtype),
                entry.prepend_axis_num, entry.axis_fragmentations, entry.replica_id,
            )  # fmt: skip
            tensors.setdefault(entry.key, []).append(part)
        else:
            assert isinstance(entry, ShardedObject), entry
            states.add(entry.unique_key)
    return {key: sorted(parts) for key, parts in tensors.items()}, states
