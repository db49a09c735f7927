"""Our side of a comparison: a converted checkpoint's logits and gradients, on one rank."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.config import load_config, rules
from megatron_hybrid.generation import ONE_RANK
from tests.distributed.layouts import merge_gradients


def logits_and_gradients(
    checkpoint: Path, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """On a rank: `[b, s, V]` logits, and gradients of the mean loss by checkpoint key.

    Args:
        checkpoint: one `iter_...`, with its run_config.yaml.
        tokens, labels: `[b, s]` int64.
    """
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.checkpoint import load_checkpoint
    from megatron_hybrid.training.distributed import model_parallel_groups

    words = [str(checkpoint / "run_config.yaml"), *ONE_RANK]
    config = load_config(words, which=rules.NO_FILES)
    platform = initialize()
    with model_parallel_groups(config, platform):
        engine_config = transformer_config(config, "torch", platform.device)
        (model,) = build_model_chunks(config, engine_config, "torch")
        load_checkpoint(config, checkpoint, [model], None, weights_only=True)
        metas = config.model.num_meta_tokens
        tokens, labels = (F.pad(each, (metas, 0)) for each in (tokens, labels))
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            logits = model.eval()(tokens, positions, None)[:, metas:]
        losses = model.train()(tokens, positions, None, labels=labels)[:, metas:]
        losses.mean().backward()
        return logits, merge_gradients([_gradient_parts(model)])


def _gradient_parts(model: torch.nn.Module) -> dict[str, list[tuple[Any, ...]]]:
    """{key: [(global shape, offset, gradient)]}: the sharded state, built over the gradients."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_hybrid.training.checkpoint_state import model_state, tensor_layout

    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    state = model_state([model], tensor_layout())
    apply_factories(state)
    parts: dict[str, list[tuple[Any, ...]]] = {}
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            place = (tensor.global_shape, tensor.global_offset, tensor.data.clone())
            parts.setdefault(tensor.key, []).append(place)
    return parts


def all_logits_and_gradients(
    checkpoints: list[Path], tokens: list[Tensor], labels: list[Tensor]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """`logits_and_gradients` of several checkpoints, on one rank."""
    return [logits_and_gradients(*each) for each in zip(checkpoints, tokens, labels, strict=True)]
