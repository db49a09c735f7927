"""Self-attention as generation runs it, over pages of keys and values.

Legend: T tokens of the step, h hidden size, k key/value heads of r query heads each, d channels of
a head.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.generation.batch import Batch, Chunk
from megatron_hybrid.generation.cache import Pages
from megatron_hybrid.generation.linears import Group, Linear, Norm
from megatron_hybrid.ops.attention import causal_attention
from megatron_hybrid.ops.paged_attention import paged_attention


class Rotary:
    """Cosines and sines of RoPE, as many as texts have become long.

    Args:
        embedding: angles of so many positions; the engine's knows base and share of the channels.
    """

    def __init__(self, embedding: Any, dtype: torch.dtype) -> None:
        self._embedding, self._dtype = embedding, dtype
        self._length = 0
        self.cos = self.sin = torch.empty(0)

    def at(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`[T, 1, 1, rotated channels]` each, of positions below `length`."""
        if length > self._length:
            self._length = max(length, 2 * self._length, 256)
            angles = self._embedding(self._length).flatten(1)
            self.cos, self.sin = (f(angles).to(self._dtype) for f in (torch.cos, torch.sin))
        return self.cos[positions][:, None, None], self.sin[positions][:, None, None]


class Attention:
    """Self-attention of what was normed; `pages` is set before the first call."""

    pages: Pages
    producer: "Attention | None" = None  # whose keys and values it has
    latest: tuple[Tensor, Tensor]  # keys and values of the step's tokens, for others that have them

    def __init__(self, layer: Any, group: Group) -> None:
        attention = layer.self_attention
        self.qkv = Linear(attention.linear_qkv)
        self.proj = Linear(attention.linear_proj, group=group)
        heads = attention.num_query_groups_per_partition
        self.num_meta_tokens: int = getattr(attention.core_attention, "num_meta_tokens", 0)
        self._size(
            layer, heads, attention.num_attention_heads_per_partition // heads,
            attention.hidden_size_per_attention_head, attention.hidden_size_per_attention_head,
        )  # fmt: skip

    def _size(
        self, layer: Any, heads: int, queries: int, channels: int, value_channels: int
    ) -> None:
        """Its heads of keys and values, with how many of queries each; channels of either."""
        self.heads, self.queries = heads, queries
        self.channels, self.value_channels = channels, value_channels
        scale = layer.config.softmax_scale
        self.scale = scale if scale is not None else channels**-0.5
        rotation = getattr(layer, "rotation", None)  # of layers of unlike sizes
        self._turn = None if rotation is None else rotation.of_layer
        self.rotated = None if rotation is None else rotation.channels
        self.rotates: bool = rotation is None or rotation.rotates
        window = layer.config.window_size
        self.window = None if window is None else window[0] + 1

    def rotary(self, embedding: Any, dtype: torch.dtype) -> Rotary:
        """Of this layer's heads, from what the engine has of the model's."""
        turn = self._turn
        return Rotary(embedding if turn is None else lambda length: turn(embedding(length)), dtype)

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.qkv, self.proj):
            each.refresh()

    def mixed(self, normed: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[T, h]` -> `[T, k * r * d]`, what the projection after it takes."""
        tokens, queries = len(normed), self.queries
        mixed = self.qkv(normed).view(tokens, self.heads, queries + 2, self.channels)
        if rotary is not None:
            rotate(mixed[:, :, : queries + 1], *rotary)
        return self._attended(
            mixed[:, :, :queries], mixed[:, :, queries], mixed[:, :, queries + 1], batch
        )

    def _attended(
        self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, *, kept: bool = False
    ) -> Tensor:
        """`[T, k, r, d]`, `[T, k, d]` and `[T, k, values' d]` -> `[T, k * r * values' d]`.

        Args:
            kept: the pages have the keys and values already.
        """
        tokens, pool = len(query), self.pages
        assert batch.places is not None
        for pages, new in () if kept else ((pool.keys, key), (pool.values, value)):
            pages.transpose(1, 2).index_put_(batch.places, new.to(pages.dtype))
        decoding = batch.decoding
        if not batch.chunks:
            return self._paged(query, batch).to(query.dtype)
        y = query.new_empty(tokens, self.heads * self.queries * self.value_channels)
        if decoding:
            y[:decoding] = self._paged(query[:decoding], batch)
        for chunk in batch.chunks:
            y[chunk.rows] = self._attend(query, key, value, chunk)
        return y

    def _paged(self, query: Tensor, batch: Batch) -> Tensor:
        table, pool = batch.tables[self.window], self.pages
        pages = len(table.owner)
        return paged_attention(
            query.to(pool.keys.dtype), pool.keys[:pages], pool.values[:pages], table, self.scale
        ).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        """Of a chunk's queries to its own keys, or to all in its sequence's pages."""
        shape = (len(chunk.sequences), chunk.length)

        def by_token(tensor: Tensor) -> Tensor:  # [length, sequences, heads, d]
            return tensor[chunk.rows].flatten(1, -2).unflatten(0, shape).transpose(0, 1)

        start = chunk.before + chunk.start
        stop = start + chunk.length
        if chunk.context is None:
            keys, values, first = by_token(key), by_token(value), 0
        else:
            pages, first = chunk.context
            keys, values = (
                pool[pages].transpose(1, 2).flatten(0, 1)[: stop - first, None].to(query.dtype)
                for pool in (self.pages.keys, self.pages.values)
            )
        attended = causal_attention(
            by_token(query), keys, values, chunks=[(start - first, stop - first)],
            window=self.window, scale=self.scale, num_meta_tokens=self.num_meta_tokens,
        )  # fmt: skip
        return attended.transpose(0, 1).flatten(0, 1)


class AttentionLayer:
    """Self-attention with the norm before it."""

    def __init__(self, layer: Any, group: Group) -> None:
        self.attention = Attention(layer, group)
        linear_qkv = layer.self_attention.linear_qkv
        self.norm = Norm(linear_qkv, "layer_norm_weight", linear_qkv.eps)

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.attention):
            each.refresh()

    def __call__(self, x: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        attention = self.attention
        return attention.proj.add_to(x, attention.mixed(self.norm(x), batch, rotary))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the first channels of `heads` `[T, k, any, d]` in place, each with that half further."""
    part = heads[..., : cos.shape[-1]]
    first, second = part.chunk(2, dim=-1)
    low, high = sin.chunk(2, dim=-1)
    turned = part * cos
    into_first, into_second = turned.chunk(2, dim=-1)
    into_first.addcmul_(second, low, value=-1)
    into_second.addcmul_(first, high)
    part.copy_(turned)
