"""`upcycling.from`: a run that starts from a dense checkpoint, on its own ranks, without a detour.

The engine loads the model's state as from any checkpoint; what it reads is made on the way, each
rank its own part, as `megatron-hybrid upcycle` would have written it.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.config import RunConfig
from megatron_hybrid.upcycling.scheme import scheme_between
from megatron_hybrid.upcycling.tensors import Made, UpcycledTensors


def load_upcycled(config: RunConfig, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Load a model's sharded state from a dense checkpoint; the rest of it as it is there.

    All ranks call it together.

    Args:
        config: of the MoE model.
        folder: the dense checkpoint, `.../iter_0000100`.
        state: sharded, of this rank.

    Raises:
        UserError: the dense model cannot become this one, or the checkpoint is damaged.
    """
    with CheckpointReader(folder) as reader:
        dense = source_config(reader, None)
        options = config.upcycling
        scheme = scheme_between(dense.model, config.model, scale_weights=options.scale_weights)
        seed = config.training.seed
        tensors = UpcycledTensors(reader, dense.model, config.model, scheme, options, seed)
        loaded = dist_checkpointing.load(state, str(folder), sharded_strategy=_Upcycle(tensors))
        reader.verify()
    return dict(loaded)


class _Upcycle:
    """Stands where the engine's strategy reads a checkpoint's files."""

    def __init__(self, tensors: UpcycledTensors) -> None:
        self._tensors = tensors
        self._layer = -1
        self._matrices: dict[str, Tensor] = {}  # of that layer; its experts are asked for in turns

    def load(self, state: dict[str, Any], folder: str, async_strategy: str = "") -> dict[str, Any]:
        """The state with tensors in place of `ShardedTensor`s, of which it is made."""
        del folder, async_strategy
        found: dict[str, Any] = dict_list_map_outplace(self._read, state)
        return found

    def _read(self, sharded: ShardedTensor) -> Tensor:
        made = self._tensors.made.get(sharded.key)
        if made is None or made.shape != tuple(sharded.global_shape):
            held = "missing" if made is None else f"of the shape {made.shape}"
            raise CheckpointError(
                f"{sharded.key} is {held}; the model has {tuple(sharded.global_shape)}"
            )
        offset, local = sharded.global_offset, tuple(sharded.local_shape)
        sizes = (*(1 for _ in range(sharded.prepend_axis_num)), *local)
        part = self._part(made, offset[0], sizes[0] if sizes else 1)
        place = tuple(
            slice(start, start + size) for start, size in zip(offset[1:], sizes[1:], strict=True)
        )
        assert sharded.data is not None
        return part[(slice(None), *place)].reshape(local).to(sharded.data)

    def _part(self, made: Made, first: int, count: int) -> Tensor:
        """Indices of dim 0 of a tensor, with all that is behind them."""
        if made.kind == "copied":
            info = self._tensors.reader.tensors[made.source]
            rows = info.matrix[0] // info.shape[0]
            part = self._tensors.copied(made, first * rows, (first + count) * rows)
            return part.view(count, *made.shape[1:])
        if made.kind != "experts":
            return self._tensors.whole(made)[first : first + count]
        if made.layer != self._layer:
            self._layer, self._matrices = made.layer, {}
        if made.source not in self._matrices:
            self._matrices[made.source] = self._tensors.matrix(made)
        matrix = self._matrices[made.source]
        experts = [
            torch.cat(list(self._tensors.expert(made, matrix, expert)))
            for expert in range(first, first + count)
        ]
        return torch.stack(experts)
