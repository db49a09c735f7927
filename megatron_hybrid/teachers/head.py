"""A teacher's output layer in its student's parts of the vocabulary, where layouts differ.

Legend: b samples of the micro batch, s tokens of a context parallel rank, h the teacher's hidden
size, v vocabulary of a tensor parallel rank of the student.
"""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_hybrid.checkpoint import files
from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.linear import parallel_linear
from megatron_hybrid.layers.multipliers import multiply_output
from megatron_hybrid.layers.vocabulary import leave_out_padding
from megatron_hybrid.model.transformer_config import transformer_config
from megatron_hybrid.platform import initialize

_KEYS = {True: "output_layer.weight", False: "embedding.word_embeddings.weight"}


class OwnHead:
    """From hidden states `[s, b, h]` to logits `[s, b, v]`."""

    def __init__(self, layer: ColumnParallelLinear) -> None:
        self._layer = layer

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._layer(hidden)[0]
        return logits


def load_head(
    teacher: RunConfig, student: RunConfig, folder: Path, backend: str, wanted: bool
) -> OwnHead | None:
    """The output layer of a teacher, in the groups in force, which are the student's.

    All ranks call it together.

    Args:
        folder: the teacher's checkpoint itself.
        wanted: whether this rank needs it.
    """
    model, asked, layer = teacher.model, {}, None
    words, rows = student.model.vocab_size, student.model.padded_vocab_size
    assert words is not None and rows is not None
    key = _KEYS[model.untie_embeddings_and_output_weights]
    if wanted:
        layer = _empty(teacher, student, backend, rows)
        asked["weight"] = make_tp_sharded_tensor_for_checkpoint(
            layer.weight.data, key, allow_shape_mismatch=True
        )
        multiply_output(layer, model.lm_head_multiplier)
        leave_out_padding(layer, words)
    with files.no_code_from_pickles():
        loaded = dist_checkpointing.load(asked, str(folder))
    if layer is None:
        return None
    with torch.no_grad():
        layer.weight.copy_(loaded["weight"])
    return OwnHead(layer.requires_grad_(False))


def _empty(teacher: RunConfig, student: RunConfig, backend: str, rows: int) -> Any:
    device = initialize().device
    config = copy(transformer_config(teacher, backend, device))
    config.tensor_model_parallel_size = student.parallel.tensor_model_parallel_size
    config.sequence_parallel = False  # it gets whole sequences
    layer = ColumnParallelLinear(
        config.hidden_size, rows, config=config, init_method=config.init_method, bias=False,
        gather_output=False, tp_group=parallel_state.get_tensor_model_parallel_group(),
    ).to(device)  # fmt: skip
    if backend == "torch":
        layer._forward_impl = parallel_linear
    return layer
