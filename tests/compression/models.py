"""A small parent of every kind of layer that is cut, what is cut from it, and masked parents."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.checkpoint.derived import Beside, new_checkpoint
from megatron_hybrid.checkpoint.files import find_checkpoint
from megatron_hybrid.checkpoint.progress import COMPRESSION
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.checkpoint.writer import CheckpointWriter
from megatron_hybrid.compression.request import Request
from megatron_hybrid.compression.write import Pruning
from megatron_hybrid.config import RunConfig
from megatron_hybrid.model.tensor_names import extra_states
from megatron_hybrid.upcycling.tensors import NO_WEIGHTS
from tests.training.runs import words

PATTERN = "M-*EM-"
Edits = Mapping[str, Callable[[Tensor], Any]]


def parent_words(run_dir: Path, *more: str) -> list[str]:
    """The command line of a parent's run of one step."""
    return words(
        run_dir, f"model.hybrid_layer_pattern={PATTERN}", "model.ffn_hidden_size=48",
        "model.num_attention_heads=4", "model.num_query_groups=2", "model.kv_channels=8",
        "model.num_moe_experts=4", "model.moe_ffn_hidden_size=16", "model.moe_router_topk=2",
        "model.moe_router_score_function=sigmoid", "model.moe_router_enable_expert_bias=true",
        "model.moe_shared_expert_intermediate_size=24", "model.init_method_std=0.1",
        "training.train_iters=1", *more,
    )  # fmt: skip


def parent_of(run: Path) -> tuple[Path, RunConfig]:
    """A run's newest checkpoint, and its config."""
    source = find_checkpoint(run)
    with CheckpointReader(source) as reader:
        return source, source_config(reader, None)


def prune(
    run: Path, save: Path, request: Request, *more: str, **options: Any
) -> tuple[RunConfig, Path]:
    """Cut a smaller model from a run's newest checkpoint: its config and its folder."""
    source, parent = parent_of(run)
    options.setdefault("keep_first", options.get("scores") is None)
    pruning = Pruning(source, parent, request, save, more, **options)
    return pruning.config, pruning.write().folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, by name."""
    with CheckpointReader(folder) as reader:
        return {
            name: reader.read(name)
            for name in reader.tensors
            if not any(part in name for part in NO_WEIGHTS)
        }


def edited(run: Path, save: Path, edits: Edits) -> Path:
    """A run's newest checkpoint with some tensors changed in place, as one of another run."""
    source, parent = parent_of(run)
    weights = tensors(source)
    for name, edit in edits.items():
        edit(weights[name])
    with CheckpointReader(source) as reader:
        beside = Beside.find(reader, parent, parent, restart_schedule=False, threads=1)
        common = {"iteration": 1, COMPRESSION: {}, "progress": vars(beside.progress)}
    with new_checkpoint(save, 1, "test") as partial:
        writer = CheckpointWriter(partial, 1)
        for name, weight in weights.items():
            writer.declare(name, tuple(weight.shape), weight.dtype)
            rows = iter([weight.contiguous()])
            writer.write_part(0, name, 0, tuple(weight.shape), rows)
        for key in extra_states(parent.model):
            writer.write_object(key, None)
        writer.finish(common)
        beside.write(partial, 1)
    return files.iteration_folder(save, 1)


def zeroed(indices: Any, dim: int = 0) -> Callable[[Tensor], Any]:
    """An edit: these indices of a dimension become 0."""
    return lambda weight: weight.index_fill_(dim, torch.as_tensor(indices), 0)
