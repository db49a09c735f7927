"""The tensors of an upcycled model, made of a dense checkpoint's as they are asked for.

Legend: n experts, f channels of an MLP (2f in the first matrix with a gate: f of the gate, then f
of up), w of an expert, h hidden_size.
"""

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_hybrid.checkpoint.derived import BLOCK_BYTES
from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.threads import in_threads
from megatron_hybrid.config import UpcyclingConfig
from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import MLP, parse_pattern
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.model.tensor_names import NO_WEIGHTS, NORM_NAMES, VOCABULARY_WEIGHTS
from megatron_hybrid.upcycling.scheme import Scheme

FC1, FC2 = "linear_fc1", "linear_fc2"
DRAWN_BYTES = 256 << 10  # the same where some is drawn, which takes ten times its size


@dataclass(frozen=True)
class Made:
    """A tensor of the upcycled model.

    Attributes:
        kind: "copied", "router", "bias", or of an upcycled layer "experts" and "shared".
        source: the dense checkpoint's tensor that it is made of; "" for a router.
        matrix: `FC1` or `FC2`, of experts and shared experts.
        layer: number of the layer, from 0, where `kind` is not "copied".
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str = ""
    matrix: str = ""
    layer: int = -1


class UpcycledTensors:
    """What the checkpoint of an upcycled model holds.

    What is drawn depends on the seed and on the tensor's place in the model alone, so that any
    layout, and a file, come to the same weights.

    Args:
        reader: of the dense checkpoint.
        dense, moe: the two models; `scheme` is `scheme_between` them.
        options: how routers are drawn and experts varied.
        seed: of what is drawn.
        threads: that read.

    Attributes:
        made: by name, in the order of the layers.

    Raises:
        CheckpointError: the checkpoint does not hold the dense model.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        dense: ModelConfig,
        moe: ModelConfig,
        scheme: Scheme,
        options: UpcyclingConfig,
        seed: int,
        threads: int = 1,
    ) -> None:
        self.reader, self.scheme, self.options, self.seed = reader, scheme, options, seed
        self.threads = threads
        self._moe = moe
        self.hidden_size = moe.hidden_size
        self.router_std = moe.init_method_std if options.router_std is None else options.router_std
        weights = {
            name: info
            for name, info in reader.tensors.items()
            if not any(part in name for part in NO_WEIGHTS)
        }
        _refuse_other_weights(reader, dense, {n: info.shape for n, info in weights.items()})
        renamed = _norm_names(dense, moe, weights)
        made: dict[str, Made] = {}
        for name, info in weights.items():
            if not self._becomes_experts(name):
                copied = Made("copied", _shape(name, info.shape, moe), info.dtype, source=name)
                made[renamed.get(name, name)] = copied
        for layer in scheme.layers:
            made |= self._layer(layer, weights[f"decoder.layers.{layer}.mlp.{FC1}.weight"].dtype)
        self.made = MappingProxyType(made)

    def _becomes_experts(self, name: str) -> bool:
        matrices = (f"mlp.{FC1}.weight", f"mlp.{FC2}.weight")
        return any(
            name == f"decoder.layers.{layer}.{matrix}"
            for layer in self.scheme.layers
            for matrix in matrices
        )

    def _layer(self, layer: int, dtype: torch.dtype) -> dict[str, Made]:
        """The tensors that one layer's MLP becomes."""
        scheme, h, our = self.scheme, self.hidden_size, f"decoder.layers.{layer}.mlp."
        n, w = scheme.num_experts, scheme.width
        halves = 2 if scheme.gated else 1
        made = {f"{our}router.weight": Made("router", (n, h), dtype, layer=layer)}
        if self._moe.moe_router_enable_expert_bias:
            made[f"{our}router.expert_bias"] = Made("bias", (n,), torch.float32, layer=layer)

        def add(kind: str, name: str, matrix: str, shape: tuple[int, ...]) -> None:
            source = f"{our}{matrix}.weight"
            made[f"{our}{name}.{matrix}.weight"] = Made(kind, shape, dtype, source, matrix, layer)

        add("experts", "experts.experts", FC1, (n, halves * w, h))
        add("experts", "experts.experts", FC2, (n, h, w))
        if scheme.shared_shards:
            shared = scheme.shared_shards * w
            add("shared", "shared_experts", FC1, (halves * shared, h))
            add("shared", "shared_experts", FC2, (h, shared))
        return made

    def copied(self, made: Made, start: int, stop: int) -> Tensor:
        """Rows of a copied tensor as a matrix: `[stop - start, width]`, those of padding 0."""
        held, width = self.reader.tensors[made.source].matrix
        end = max(start, min(stop, held))
        rows = self.reader.read_rows(made.source, start, end)
        return torch.cat([rows, rows.new_zeros(stop - end, width)]) if end < stop else rows

    def matrix(self, made: Made) -> Tensor:
        """What routed experts are cut from: the scaled matrix, `[f or 2f, h]` or `[h, f]`."""
        return self._read(made, self.scheme.scale)

    def _read(self, made: Made, scale: float) -> Tensor:
        """The MLP's matrix times `scale`, in its dtype; nothing else is as large."""
        rows, width = self.reader.tensors[made.source].matrix
        matrix = torch.empty(rows, width, dtype=made.dtype)
        step = max(1, BLOCK_BYTES // (width * made.dtype.itemsize))

        def read(start: int, _: int) -> None:
            block = self.reader.read_rows(made.source, start, min(start + step, rows))
            if scale != 1.0:
                block = block.float().mul_(scale)
            matrix[start : start + step] = block

        in_threads(range(0, rows, step), read, self.threads)
        return matrix

    def expert(self, made: Made, matrix: Tensor, expert: int) -> Iterator[Tensor]:
        """One routed expert's matrix `[w or 2w, h]` or `[h, w]`, some rows at a time.

        Args:
            matrix: as `matrix` gives it.
        """
        cut = self._cut(made, matrix, self.scheme.channels_of(expert))
        if not self.options.reinit_fraction:
            yield from (rows.contiguous() for part in cut for rows in _blocks(part, BLOCK_BYTES))
            return
        drawn, std = self._drawn_channels(made.layer, expert), _std(cut)
        draws = self._generator(made.layer, f"{made.matrix} of expert {expert}")
        for part in cut:
            start = 0  # of the block, of the rows
            for rows in _blocks(part, DRAWN_BYTES):
                rows = rows.clone()
                at = (
                    (slice(None), drawn) if made.matrix == FC2 else drawn[start : start + len(rows)]
                )
                start += len(rows)
                rows[at] = torch.randn(rows[at].shape, generator=draws).mul_(std).to(rows.dtype)
                yield rows

    def whole(self, made: Made) -> Tensor:
        """A tensor of an upcycled layer other than its routed experts'."""
        if made.kind == "router":
            return self._router(made)
        if made.kind == "bias":
            return torch.zeros(made.shape, dtype=made.dtype)
        # The shared expert has its channels as they were.
        return torch.cat(self._cut(made, self._read(made, 1.0), self.scheme.shared_channels))

    def _cut(self, made: Made, matrix: Tensor, channels: slice) -> tuple[Tensor, ...]:
        """Views of the channels in a matrix; gate and up are cut separately."""
        if made.matrix == FC2:
            return (matrix[:, channels],)
        return tuple(half[channels] for half in matrix.split(self.scheme.channels))

    def _drawn_channels(self, layer: int, expert: int) -> Tensor:
        """Which of an expert's channels are drawn anew, in both of its matrices: bool `[w]`."""
        w = self.scheme.width
        draws = self._generator(layer, f"channels of expert {expert}")
        drawn = torch.zeros(w, dtype=torch.bool)
        drawn[torch.randperm(w, generator=draws)[: round(self.options.reinit_fraction * w)]] = True
        return drawn

    def _router(self, made: Made) -> Tensor:
        """`[n, h]`: a drawn row for each copy of the MLP, the same for all of its experts."""
        scheme = self.scheme
        draws = self._generator(made.layer, "router")
        rows = torch.randn(scheme.expansion, self.hidden_size, generator=draws)
        rows = rows.mul_(self.router_std).repeat_interleave(scheme.routed_shards, dim=0)
        if self.options.router_noise:
            draws = self._generator(made.layer, "router noise")
            rows += torch.randn(rows.shape, generator=draws).mul_(self.options.router_noise)
        return rows.to(made.dtype)

    def _generator(self, layer: int, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/layer {layer}/{what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _shape(name: str, shape: tuple[int, ...], moe: ModelConfig) -> tuple[int, ...]:
    """The shape of a copied tensor: a vocabulary may be padded otherwise."""
    if name not in VOCABULARY_WEIGHTS:
        return shape
    rows = moe.padded_vocab_size
    assert rows is not None, "resolved from the tokenizer before anything is made"
    return (rows, *shape[1:])


def _blocks(matrix: Tensor, nbytes: int) -> tuple[Tensor, ...]:
    """A matrix, some of its rows at a time."""
    return matrix.split(max(1, nbytes // (matrix.shape[1] * matrix.dtype.itemsize)))


def _std(parts: Sequence[Tensor]) -> float:
    """The standard deviation of all elements, without a copy of them all."""
    number, total, squares = 0, 0.0, 0.0
    for block in (block for part in parts for block in _blocks(part, DRAWN_BYTES)):
        values = block.float()
        number += values.numel()
        total += values.sum(dtype=torch.float64).item()
        squares += values.square().sum(dtype=torch.float64).item()
    return math.sqrt(max(0.0, squares - total**2 / number) / max(1, number - 1))


def _norm_names(dense: ModelConfig, moe: ModelConfig, names: Collection[str]) -> dict[str, str]:
    """Norms as the dense checkpoint calls them -> as they are called in the upcycled model.

    An MLP's norm belongs to its first linear, that of experts is apart; and a checkpoint made
    without Transformer Engine has other names for all of them.
    """
    renamed: dict[str, str] = {}
    patterns = (parse_pattern(model.hybrid_layer_pattern).layers for model in (dense, moe))
    for number, (before, after) in enumerate(zip(*patterns, strict=True)):
        prefix, ours = f"decoder.layers.{number}.", NORM_NAMES[after][0]
        for name in NORM_NAMES[before]:
            if prefix + name in names:
                renamed[prefix + name] = prefix + ours
    return renamed


def _refuse_other_weights(
    reader: CheckpointReader, model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint that does not hold the model its config describes."""
    h, problems = model.hidden_size, []
    for layer in layers(model):
        f, halves = layer.model.ffn_hidden_size or 0, 2 if layer.model.activation == "swiglu" else 1
        mlp = layer.kind == MLP
        for matrix, shape in ((FC1, (halves * f, h)), (FC2, (h, f))) if mlp else ():
            name = f"decoder.layers.{layer.number - 1}.mlp.{matrix}.weight"
            if shapes.get(name) != shape:
                problems.append(f"{name} is {shapes.get(name, 'missing')}; it must be {shape}")
    held = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if not name.endswith("router.expert_bias")
    )
    expected = count_parameters(model).total
    if held != expected:
        problems.append(f"it holds {held:,} parameters; its config describes {expected:,}")
    if problems:
        lines = [f"  - {problem}" for problem in problems]
        raise CheckpointError(
            "\n".join([f"{reader.folder} does not hold the model of its config:", *lines])
        )
