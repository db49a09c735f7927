"""Importance of a model's channels, heads, experts and layers, by their places in the whole model:
one file, whatever layout it was computed in.

A safetensors file; layers are counted from 1:

    hidden               [h]      embedding channels
    depth                [layers] 1 - cosine of what goes into a layer and what comes out
    layers.2.ffn         [f]      channels of an MLP
    layers.5.shared      [f]      of the shared expert of a MoE layer
    layers.1.mamba       [H, P]   heads of Mamba-2 by channels of a head
    layers.8.query_heads [n]      of attention
    layers.5.experts     [E]
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint.reader import CheckpointReader, tensor_bytes
from megatron_hybrid.compression.axes import EXPERTS, FFN, HIDDEN, QUERY_HEADS, SHARED
from megatron_hybrid.compression.request import has_axes
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.pattern import ATTENTION, MAMBA, MLP, MOE
from megatron_hybrid.errors import UserError
from megatron_hybrid.fileio import file_errors, write_atomic
from megatron_hybrid.model.tensor_names import NO_WEIGHTS
from megatron_hybrid.small_files import naming

DEPTH, MAMBA_SCORES = "depth", "mamba"
_FORMAT = "megatron-hybrid scores 1"


def of_layer(number: int, what: str) -> str:
    """The name of a layer's scores; `number` from 1."""
    return f"layers.{number}.{what}"


@dataclass(frozen=True)
class Scores:
    """Importance, the larger the more important.

    Attributes:
        values: by name as above, float32 on the CPU.
        fingerprint: of the checkpoint that was scored.
        said: how, in words.
    """

    values: Mapping[str, Tensor]
    fingerprint: str
    said: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from safetensors.torch import save

        metadata = {**self.said, "format": _FORMAT, "fingerprint": self.fingerprint}
        values = {name: value.float().contiguous() for name, value in self.values.items()}
        write_atomic(path, save(values, metadata))


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """All scores that a model has, and their shapes."""
    every = layers(model)
    found: dict[str, tuple[int, ...]] = {HIDDEN: (model.hidden_size,), DEPTH: (len(every),)}
    for layer in every:
        own = layer.model
        sizes: dict[str, tuple[int | None, ...]] = {}
        if not has_axes(layer):
            continue
        if layer.kind == MLP:
            sizes[FFN] = (own.ffn_hidden_size,)
        elif layer.kind == MAMBA:
            sizes[MAMBA_SCORES] = (own.mamba_num_heads, own.mamba_head_dim)
        elif layer.kind == ATTENTION:
            sizes[QUERY_HEADS] = (own.num_attention_heads,)
        elif layer.kind == MOE:
            sizes[EXPERTS] = (own.num_moe_experts,)
            if own.moe_shared_expert_intermediate_size is not None:
                sizes[SHARED] = (own.moe_shared_expert_intermediate_size,)
        for what, shape in sizes.items():
            found[of_layer(layer.number, what)] = tuple(int(size or 0) for size in shape)
    return found


def read_scores(path: Path, model: ModelConfig, fingerprint: str) -> Scores:
    """Scores of a checkpoint.

    Args:
        model: that it holds.
        fingerprint: `fingerprint_of` it.

    Raises:
        UserError: the file cannot be read, is damaged, or is of another model or checkpoint.
    """
    with naming(path):
        if not path.is_file():
            raise FileNotFoundError(2, "there is no such file")
        values, said = _read(path)
        if said.pop("format", None) != _FORMAT:
            raise ValueError("it is no file of `megatron-hybrid compress score`")
        problems = []
        for name, shape in shapes(model).items():
            found = values.get(name)
            if found is None or found.shape != shape:
                has = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
                problems.append(f"{name} {has}; it must have {shape}")
            elif not found.isfinite().all():
                problems.append(f"{name} holds what is no finite number")
    theirs = said.pop("fingerprint", "")
    if problems or theirs != fingerprint:
        lines = problems[:10] or [
            f"its weights have the fingerprint {theirs[:16]}, those to be pruned {fingerprint[:16]}"
        ]
        raise UserError(
            f"--scores {path} is of another checkpoint ({said.get('checkpoint', 'unknown')}): "
            f"{'; '.join(lines)}"
        )
    return Scores(values, theirs, said)


def refuse_other_file(path: Path) -> None:
    """Refuse to write over what is no file of scores; make the folder that it goes into.

    Raises:
        UserError: it is a folder, holds something else, or its folder cannot be made.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name the file, such as {path / 'scores'}")
    if path.is_file() and path.stat().st_size:
        try:
            _, said = _read(path)
        except ValueError:
            said = {}
        if said.get("format") != _FORMAT:
            raise UserError(f"--output {path} is there, and holds no scores: name another file")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            names = file.keys()  # it is no mapping
            return {name: file.get_tensor(name).float() for name in names}, metadata
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def fingerprint_of(reader: CheckpointReader) -> str:
    """SHA-256 of a checkpoint's vectors (norms, biases, decays), which every step changes: the same
    whatever layout saved it.
    """
    digest = hashlib.sha256()
    for name in sorted(reader.tensors):
        if any(part in name for part in NO_WEIGHTS) or len(reader.tensors[name].shape) != 1:
            continue
        vector = reader.read(name)
        digest.update(f"{name} {vector.dtype}\n".encode())
        digest.update(tensor_bytes(vector.contiguous()))
    return digest.hexdigest()


def most_important(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest scores, ascending; of equal ones the first: int64 `[count]`."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values
