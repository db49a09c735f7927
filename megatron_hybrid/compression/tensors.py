"""The tensors of a smaller model, read from its parent's checkpoint as they are asked for.

The gated norm of Mamba-2 and the norms before the layers divide by the root of a mean square. Where
c of C channels stay, the sum of squares is the parent's with the others masked, but the mean is one
over c: weights of such norms are multiplied by sqrt(C / c), so that the smaller model is the masked
parent, but for the epsilon beside the mean square.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_hybrid.checkpoint.derived import BLOCK_BYTES
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.reader import CheckpointReader, TensorInfo, as_matrix
from megatron_hybrid.compression.axes import HIDDEN, dims_of, stored_axes
from megatron_hybrid.compression.sizes import Kept
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.model.tensor_names import NO_WEIGHTS, PREDICTION, VOCABULARY_WEIGHTS

_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Made:
    """A tensor of the smaller model.

    Attributes:
        source: the parent's tensor that it is made of.
        kept: of each dimension, the indices that stay; None: all.
        factor: on all of it.
    """

    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: tuple[Tensor | None, ...]
    factor: float = 1.0


class PrunedTensors:
    """What the checkpoint of a smaller model holds.

    Args:
        reader: of the parent's checkpoint.
        parent, model: the two models.
        kept: the layers that stay.
        hidden: the embedding channels that stay.
        of_layers: by a layer's number in the parent, what stays of it (`choose.of_kept`).

    Attributes:
        made: by name.

    Raises:
        CheckpointError: the checkpoint does not hold the parent, or what cannot be cut.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        parent: ModelConfig,
        model: ModelConfig,
        kept: Sequence[Kept],
        hidden: Tensor,
        of_layers: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        self.reader, self._model = reader, model
        self._layers = {each.parent.number: each for each in kept}
        self._axes = {
            number: {HIDDEN: hidden} | stored_axes(each.parent.model, of_layers[number])
            for number, each in self._layers.items()
        }
        self._hidden, self._width = hidden, parent.hidden_size
        weights = {
            name: info
            for name, info in reader.tensors.items()
            if not any(part in name for part in NO_WEIGHTS)
        }
        _refuse_other_weights(reader, parent, weights)
        made = {}
        for name, info in weights.items():
            if name.startswith(PREDICTION):
                continue
            if (found := self._made(name, info)) is not None:
                made[found[0]] = found[1]
        self.made = MappingProxyType(made)
        held = sum(
            torch.Size(each.shape).numel()
            for name, each in made.items()
            if not name.endswith("router.expert_bias")
        )
        assert held == count_parameters(model).total, (held, count_parameters(model).total)

    def _made(self, name: str, info: TensorInfo) -> tuple[str, Made] | None:
        """The tensor's name in the smaller model, and what it is there; None: it has gone."""
        number, kind, own, ours = 0, "", name, name
        model, axes = self._model, {HIDDEN: self._hidden}
        if name.startswith(_LAYERS):
            text, _, own = name.removeprefix(_LAYERS).partition(".")
            number = int(text) + 1
            if number not in self._layers:
                return None
            layer = self._layers[number]
            kind, model, axes = layer.parent.kind, layer.parent.model, self._axes[number]
            ours = f"{_LAYERS}{layer.number - 1}.{own}"
        dims = dims_of(own, kind, model)
        kept: list[Tensor | None] = [None] * len(info.shape)
        factor = 1.0
        if dims is None:
            # Of kinds that are not cut: the request refuses them where the width is.
            if len(self._hidden) < self._width:
                raise CheckpointError(f"{self.reader.folder}: {name} is of no kind that is cut")
        else:
            for place, axis in enumerate(dims.axes):
                indices = None if axis is None else axes.get(axis)
                if indices is not None and len(indices) < info.shape[place]:
                    kept[place] = indices
            if dims.normed and kept[0] is not None:
                factor = math.sqrt(info.shape[0] / len(kept[0]))
        sizes = zip(info.shape, kept, strict=True)
        shape = tuple(size if indices is None else len(indices) for size, indices in sizes)
        if name in VOCABULARY_WEIGHTS:  # which may be padded otherwise
            assert self._model.padded_vocab_size is not None
            shape = (self._model.padded_vocab_size, *shape[1:])
        return ours, Made(name, shape, info.dtype, tuple(kept), factor)

    def rows(self, made: Made, start: int, stop: int) -> Iterator[Tensor]:
        """Indices of dim 0 of a tensor, in order, a block of rows of it as a matrix at a time.

        In memory is what of the parent's rows lies between the first and the last of a block.
        """
        source = self.reader.tensors[made.source]
        wanted = _rows_of(source.shape, made.kept)
        of_index = as_matrix(made.shape)[0] // made.shape[0]
        first, last = start * of_index, stop * of_index
        there = min(last, len(wanted))
        columns = made.kept[-1] if len(made.kept) > 1 else None
        width = source.matrix[1]
        span = max(1, BLOCK_BYTES // (width * made.dtype.itemsize))
        at = first
        while at < there:
            begin = int(wanted[at])
            end = int(torch.searchsorted(wanted[at:there], begin + span)) + at
            rows = self.reader.read_rows(made.source, begin, int(wanted[end - 1]) + 1)
            if end - at < len(rows):
                rows = rows[wanted[at:end] - begin]
            if columns is not None:
                rows = rows[:, columns]
            if made.factor != 1.0:
                rows = (rows.double() * made.factor).to(made.dtype)
            yield rows.contiguous()
            at = end
        if last > max(first, there):  # of padding
            yield torch.zeros(last - max(first, there), as_matrix(made.shape)[1], dtype=made.dtype)


def _rows_of(shape: tuple[int, ...], kept: tuple[Tensor | None, ...]) -> Tensor:
    """The parent's rows as a matrix that stay, ascending: int64."""
    leading = len(shape) - 1 if len(shape) > 1 else len(shape)
    rows = torch.zeros(1, dtype=torch.int64)
    for size, indices in zip(shape[:leading], kept[:leading], strict=True):
        of = torch.arange(size) if indices is None else indices
        rows = (rows[:, None] * size + of).flatten()
    return rows


def _refuse_other_weights(
    reader: CheckpointReader, model: ModelConfig, weights: Mapping[str, TensorInfo]
) -> None:
    """Refuse a checkpoint that does not hold the model its config describes."""
    held = sum(
        torch.Size(info.shape).numel()
        for name, info in weights.items()
        if not name.endswith("router.expert_bias")
    )
    expected = count_parameters(model).total
    if held != expected:
        raise CheckpointError(
            f"{reader.folder} does not hold the model of its config: it holds {held:,} "
            f"parameters; its config describes {expected:,}"
        )
