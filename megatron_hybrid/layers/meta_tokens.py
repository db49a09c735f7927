"""Meta tokens: learnt vectors before every text, as Hymba has them.

A row of tokens has room for them in front, which `data.batch` makes; here they are put there.
From there on they are tokens like any other, but that attention sees them whatever its window, and
that each of several documents in a row begins after them.

Legend: s sequence (of this rank), b batch, h hidden size, m meta tokens, l the whole row with them.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_hybrid.layers.context_parallel import local_chunks
from megatron_hybrid.layers.norm import parameter_device


def add_meta_tokens(
    embedding: nn.Module, config: TransformerConfig, count: int, draw: Callable[[Tensor], None]
) -> None:
    """Give an embedding `meta_tokens` `[m, h]`, and have it put them where a row begins.

    Args:
        draw: fills them, where the config has parameters drawn.
    """
    shape = (count, config.hidden_size)
    metas = nn.Parameter(
        torch.empty(shape, dtype=config.params_dtype, device=parameter_device(config))
    )
    if config.perform_initialization:
        with torch.no_grad():
            draw(metas)
    # Under sequence parallelism a TP rank has some of the rows, and of the gradient.
    metas.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    embedding.register_parameter("meta_tokens", metas)
    embedding.register_forward_hook(_put_in_front)


def _put_in_front(embedding: Any, _inputs: Any, embedded: Tensor) -> Tensor:
    """`[s, b, h]`, of which some rows are to be meta tokens -> the same with those."""
    metas: Tensor = embedding.meta_tokens
    places = _places(embedding.config, len(embedded)).to(embedded.device)
    rows = metas[places.clamp(max=len(metas) - 1)].to(embedded.dtype)[:, None]
    return torch.where((places < len(metas))[:, None, None], rows, embedded)


def _places(config: TransformerConfig, length: int) -> Tensor:
    """Where in the row the tokens of this rank are, of which it has `length`."""
    cp_group = parallel_state.get_context_parallel_group()
    tp = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
    chunks = local_chunks(length * tp * cp_group.size(), cp_group)
    places = torch.cat([torch.arange(*chunk) for chunk in chunks])
    rank = parallel_state.get_tensor_model_parallel_rank() if tp > 1 else 0
    return places[rank * length : (rank + 1) * length]


class DocumentRotary(nn.Module):
    """The engine's angles, of a token's place in its own document, which begins after the metas.

    Where no document sees another any places do that are as far apart; meta tokens are seen from
    all of them.

    Args:
        rotary: the engine's.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions: Tensor | None = None  # [b, s], of the row at hand

    def get_rotary_seq_len(self, *arguments: Any) -> int:
        """The engine's question."""
        length: int = self.rotary.get_rotary_seq_len(*arguments)
        return length

    def forward(self, length: int, packed_seq: bool = False) -> Tensor:
        """`[s, b, 1, c]` angles; where there is no row, as in generation, `[length, 1, 1, c]` of
        places one after the other."""
        if self.positions is None:
            angles: Tensor = self.rotary(length, packed_seq=packed_seq)
            return angles
        every: Tensor = self.rotary.get_emb(length)
        return every[self.positions.t()].squeeze(2)


def rotate_by_document(model: nn.Module) -> None:
    """Have a model's angles go by the positions that it is told."""
    rotary = model.rotary_pos_emb = DocumentRotary(model.rotary_pos_emb)

    def take(_model: Any, arguments: tuple[Any, ...], named: Any) -> None:
        rotary.positions = arguments[1]

    def leave(*_: Any) -> None:
        rotary.positions = None

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.register_forward_hook(leave)
