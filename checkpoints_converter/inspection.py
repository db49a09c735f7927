"""What is in a checkpoint, distributed or a Hugging Face folder, and how two of them differ.

Read from indices, headers and configs; tensors only where their values are compared, and then in
blocks of rows. No model, no process group, and nothing of what is read is run.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.safetensors_files import SafetensorsReader
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.inert_pickle import Opaque
from megatron_hybrid.checkpoint.reader import COMMON_FILE, CheckpointReader, as_matrix
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    KINDS,
    MAMBA,
    MLP,
    MOE,
    PARALLEL,
    made_of,
)
from megatron_hybrid.config.yaml_text import parse_yaml
from megatron_hybrid.data.saved_plan import SavedPlan, read_saved_plan
from megatron_hybrid.small_files import naming, read_json

DISTRIBUTED, HUGGING_FACE = "distributed checkpoint", "Hugging Face folder"
OPTIMIZER = "optimizer."
EMBEDDINGS, OUTPUT, FINAL_NORM, OTHER = "embeddings", "output layer", "final norm", "other"
BLOCK_BYTES = 32 << 20
# Fields of `parallel` in a run's config, and of the arguments in Megatron-LM's own checkpoints.
LAYOUT_FIELDS = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# By names of tensors in ours and in Hugging Face's layers; experts have MLPs in them.
_SIGNS = (
    (GDN, re.compile(r"self_attention\.(A_log|conv1d|in_proj|out_norm)")),
    (MAMBA, re.compile(r"A_log|conv1d|in_proj")),
    (ATTENTION, re.compile(r"self_attention|self_attn|q_proj|attention_norm|pre_avg_layernorm")),
    # Hymba's only expert is an MLP.
    (
        MOE,
        re.compile(
            r"router|(?<!\.moe\.)experts|\.moe\.experts\.[1-9]|mixer\.gate\.|block_sparse_moe"
        ),
    ),
    (MLP, re.compile(r"mlp|up_proj|feed_forward")),
)
_SECOND_HALF = re.compile(
    r"mlp|feed_forward|block_sparse_moe|\.moe\.|pre_moe_|pre_ff_|post_attention_"
)
_OUTSIDE = (
    (EMBEDDINGS, re.compile(r"embed")),
    (OUTPUT, re.compile(r"^(output_layer|lm_head)\.")),
    (FINAL_NORM, re.compile(r"norm")),
)


class Stored(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


@dataclass
class Part:
    """All layers of one kind together, or one of the parts outside the layers."""

    layers: int = 0
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0

    def add(self, stored: Stored) -> None:
        """Count one tensor more."""
        self.tensors += 1
        self.parameters += stored.elements
        self.bytes += stored.elements * stored.dtype.itemsize


@dataclass
class Contents:
    """What a checkpoint says of itself.

    Attributes:
        kind: `DISTRIBUTED` or `HUGGING_FACE`.
        tensors: those of the model, by name.
        optimizer: those of the optimizer's state, by name.
        config: the run's resolved config, Megatron-LM's arguments, or config.json; {} without one.
        layout: sizes of the parallel dimensions that saved it, above 1; None if not recorded.
        progress: steps, samples and tokens, as far as they are recorded.
        plan: the data plan, None without one.
    """

    kind: str
    folder: Path
    tensors: dict[str, Stored]
    optimizer: dict[str, Stored]
    config: dict[str, Any]
    layout: dict[str, int] | None = None
    progress: dict[str, int] = field(default_factory=dict)
    plan: SavedPlan | None = None

    @property
    def pattern(self) -> str:
        """One symbol a layer, as the tensors show it; several for a block of several layers."""
        return "".join(symbols for _, symbols in sorted(_symbols_of_layers(self.tensors).items()))

    @property
    def parts(self) -> dict[str, Part]:
        """Sizes by kind of layer (a symbol of the pattern), and outside the layers."""
        layers = _symbols_of_layers(self.tensors)
        parts: dict[str, Part] = {}
        for symbols in layers.values():
            for symbol in symbols:
                parts.setdefault(symbol, Part()).layers += 1
        for name, stored in self.tensors.items():
            parts.setdefault(_part_of(name, layers), Part()).add(stored)
        order = [*KINDS, EMBEDDINGS, OUTPUT, FINAL_NORM, OTHER]
        return {name: parts[name] for name in order if name in parts}


def _layer_number(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _symbols_of_layers(tensors: Mapping[str, Stored]) -> dict[int, str]:
    """Number of a layer -> its symbols: one, or mixer and MLP where a block has both."""
    signs: dict[int, set[str]] = {}
    for name in tensors:
        number = _layer_number(name)
        if number is not None:
            found = signs.setdefault(number, set())
            found |= {symbol for symbol, sign in _SIGNS if sign.search(name)}
    for found in signs.values():
        if MOE in found:
            found.discard(MLP)
        if GDN in found:
            found -= {MAMBA, ATTENTION}
        if found >= {*made_of(PARALLEL)}:
            found.difference_update(made_of(PARALLEL))
            found.add(PARALLEL)
    order = [PARALLEL, *(symbol for symbol, _ in _SIGNS)]
    return {number: "".join(s for s in order if s in found) for number, found in signs.items()}


def _part_of(name: str, layers: Mapping[int, str]) -> str:
    number = _layer_number(name)
    if number is None:
        return next((part for part, sign in _OUTSIDE if sign.search(name)), OTHER)
    symbols = layers[number]
    if not symbols:
        return OTHER
    return symbols[-1] if _SECOND_HALF.search(name) else symbols[0]


class Opened(NamedTuple):
    """A checkpoint whose tensors can be read: `read_rows(name, start, stop)`, rows of a matrix."""

    contents: Contents
    read_rows: Callable[[str, int, int], Tensor]


def open_any(path: Path) -> Opened:
    """A distributed checkpoint (or the newest of a run), or a Hugging Face folder.

    Raises:
        UserError: it is neither, or damaged.
    """
    if (path / "config.json").is_file():
        return _open_hugging_face(path)
    return _open_distributed(find_checkpoint(path))


def _open_hugging_face(folder: Path) -> Opened:
    reader = SafetensorsReader(folder)
    tensors = {name: Stored(info.shape, info.dtype) for name, info in reader.tensors.items()}
    config = read_json(folder / "config.json", ConversionError)
    return Opened(Contents(HUGGING_FACE, folder, tensors, {}, config), reader.read_rows)


def _open_distributed(folder: Path) -> Opened:
    reader = CheckpointReader(folder)
    stored = {name: Stored(info.shape, info.dtype) for name, info in reader.tensors.items()}
    model = {name: info for name, info in stored.items() if not name.startswith(OPTIMIZER)}
    optimizer = {name: info for name, info in stored.items() if name.startswith(OPTIMIZER)}
    common, plan = reader.common, read_saved_plan(folder)
    config: dict[str, Any] = {}
    sizes: Mapping[str, Any] | None = None
    # Not held to the fields of this version: a config of another one is shown, too.
    with naming(reader.config_file or folder / COMMON_FILE, ConversionError):
        if reader.config_file is not None:
            config = dict(parse_yaml(reader.config_file.read_text(encoding="utf-8")))
            sizes = config.get("parallel", {})
        elif isinstance(arguments := common.get("args"), Opaque):
            config = {name: value for name, value in vars(arguments).items() if _is_plain(value)}
            sizes = config
        layout = None
        if sizes is not None:
            asked = {short: sizes.get(name) for short, name in LAYOUT_FIELDS.items()}
            layout = {short: size for short, size in asked.items() if size is not None and size > 1}
        progress = _progress(common, config, plan)
    contents = Contents(DISTRIBUTED, folder, model, optimizer, config, layout, progress, plan)
    return Opened(contents, reader.read_rows)


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float | str | list | tuple | dict | None)


def _progress(
    common: Mapping[str, Any], config: Mapping[str, Any], plan: SavedPlan | None
) -> dict[str, int]:
    recorded = common.get("progress") or {}
    found = {
        "steps": recorded.get("iteration", common.get("iteration")),
        "samples": recorded.get("consumed_samples", config.get("consumed_train_samples")),
    }
    seq_length = config.get("data", config).get("seq_length")
    if plan is not None:
        found["samples"] = plan.consumed_samples
        found["tokens"] = sum(use.tokens for use in plan.plan.consumed(plan.consumed_samples))
    elif found["samples"] is not None and seq_length is not None:
        found["tokens"] = found["samples"] * seq_length
    return {name: int(count) for name, count in found.items() if count is not None}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both.

    Attributes:
        what: one of "only in the first", "only in the second", "shape", "dtype", "values".
        detail: both shapes or dtypes, or the largest absolute difference of values.
    """

    name: str
    what: str
    detail: str


def tensor_differences(
    one: Opened, other: Opened, *, values: bool, optimizer: bool
) -> Iterator[TensorDifference]:
    """How the tensors of two checkpoints of the same kind differ, in the order of their names.

    Args:
        values: read and compare the numbers, too; else shapes and dtypes only.
        optimizer: the optimizer's state as well.

    Raises:
        ConversionError: the two are not of the same kind.
    """
    kinds = one.contents.kind, other.contents.kind
    if kinds[0] != kinds[1]:
        raise ConversionError(
            f"{one.contents.folder} is a {kinds[0]} and {other.contents.folder} a {kinds[1]}: "
            "their tensors have different names; `megatron-hybrid convert verify` compares them"
        )
    first, second = (
        each.contents.tensors | (each.contents.optimizer if optimizer else {})
        for each in (one, other)
    )
    for name in sorted(first.keys() | second.keys()):
        if name not in second or name not in first:
            which = "first" if name in first else "second"
            stored = first.get(name) or second[name]
            yield TensorDifference(name, f"only in the {which}", str(list(stored.shape)))
            continue
        ours, theirs = first[name], second[name]
        if ours.shape != theirs.shape:
            yield TensorDifference(name, "shape", f"{list(ours.shape)}, {list(theirs.shape)}")
            continue
        if ours.dtype != theirs.dtype:
            yield TensorDifference(name, "dtype", f"{ours.dtype}, {theirs.dtype}")
        if values and (largest := _largest_difference(one, other, name, ours.shape)) != 0:
            yield TensorDifference(name, "values", f"{largest:.3e}")


def _largest_difference(one: Opened, other: Opened, name: str, shape: tuple[int, ...]) -> float:
    """The largest absolute difference of two tensors' values; nan where only one is nan."""
    rows, width = as_matrix(shape)
    step = max(1, BLOCK_BYTES // (8 * max(1, width)))
    largest = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        first, second = (each.read_rows(name, start, stop).double() for each in (one, other))
        # The same infinities, and nans in the same places, are no difference.
        same = (first == second) | (first.isnan() & second.isnan())
        difference = (first - second).abs().masked_fill(same, 0.0)
        if difference.numel():
            largest = torch.maximum(largest, difference.max())
    return largest.item()


def config_differences(one: Contents, other: Contents) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> its values in the first and the second, where they differ; None if absent."""
    first, second = dict(_flat(one.config)), dict(_flat(other.config))
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner
