"""Attention and Mamba-1 side by side as in Hymba: one projection to both, the mean of their normed
outputs, and one projection of that.

Source: Dong et al., "Hymba: A Hybrid-head Architecture for Small Language Models", 2024.

Legend: s sequence (of this rank), b batch, h hidden size; n query heads and g key/value heads of
this TP rank, c channels of queries and keys, v of values, d = n * v channels of Mamba.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn

from megatron_hybrid.layers.mamba import MambaMixerSubmodules
from megatron_hybrid.layers.mamba1 import Mamba1Mixer
from megatron_hybrid.layers.norm import ShardedRMSNorm
from megatron_hybrid.layers.parallel_heads import TwoMixers


@dataclass
class SharedHeadsMixerSubmodules(MambaMixerSubmodules):
    """The linears around both mixers, `in_proj` with the layer's norm in it, and attention."""

    core_attention: Any = field(default=IdentityOp)


class SharedHeadsMixer(Mamba1Mixer):
    """`in_proj` packed [q, k, v, x, z], attention and Mamba-1, their join, `out_proj`.

    Forward: `[s, b, h]` -> (`[s, b, h]`, None, keys and values for layers that reuse them).

    Args:
        reuse_kv: it has no keys and values, and attends to those of another layer (`reuse_of`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SharedHeadsMixerSubmodules,
        d_model: int,
        *,
        reuse_kv: bool = False,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **named: Any,
    ) -> None:
        self.reuse_kv = reuse_kv
        super().__init__(
            config, submodules, d_model, layer_number=layer_number, pg_collection=pg_collection,
            **named,
        )  # fmt: skip
        self.core_attention = submodules.core_attention(
            config=config, layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal, attention_type="self",
            softmax_scale=config.softmax_scale, pg_collection=pg_collection,
        )  # fmt: skip
        # Of others, the first of which is never a part of this module.
        self._producer: list[SharedHeadsMixer] = []
        self._is_last = self._is_reused = False
        self._kept: tuple[Tensor, Tensor] | None = None
        self._recomputes = config.recompute_granularity == "full"
        self.recompute_core_attention = (
            config.recompute_granularity == "selective"
            and "core_attn" in (config.recompute_modules or ())
        )
        eps = config.layernorm_epsilon
        self.attention_norm = ShardedRMSNorm(config, self.d_inner, eps, self.tp_group)
        self.ssm_norm = ShardedRMSNorm(config, self.d_inner, eps, self.tp_group)

    def _parts_of_in_proj(self) -> dict[str, int]:
        config, tp = self.config, self.tp_group.size()
        assert config.num_query_groups is not None and config.kv_channels is not None
        self.heads, self.groups = config.num_attention_heads // tp, config.num_query_groups // tp
        self.channels, self.value_channels = config.kv_channels, self.d_inner // self.heads
        keys = {
            "k": self.groups * self.channels,
            "v": self.groups * self.value_channels,
        }
        return {
            "q": self.heads * self.channels,
            **({} if self.reuse_kv else keys),
            **super()._parts_of_in_proj(),
        }

    def reuse_of(self, producer: "SharedHeadsMixer", *, is_last: bool) -> None:
        """Attend to the keys and values of another layer of this pipeline chunk.

        Args:
            is_last: no later layer does.
        """
        self._producer, self._is_last, producer._is_reused = [producer], is_last, True

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mix along the sequence, twice; arguments as of `SharedHeads`."""
        projected, _ = self.in_proj(hidden_states)
        *attention, x, z = self.in_proj_parts.values()
        of_attention, of_scan = projected.split([sum(attention), x + z], dim=-1)
        q, *own = of_attention.split(attention, dim=-1)
        query = self._rotated(q.unflatten(-1, (self.heads, self.channels)), rotary_pos_emb)
        if self.reuse_kv:
            key, value = self._reused(context)
        else:
            key = self._rotated(own[0].unflatten(-1, (self.groups, self.channels)), rotary_pos_emb)
            value = own[1].unflatten(-1, (self.groups, self.value_channels))
            context = self._passed_on(key, value)
        attended = self._attend(query, key, value, packed_seq_params)
        seq_idx = None if packed_seq_params is None else packed_seq_params.seq_idx
        scanned = self._scan(of_scan, seq_idx)
        joined = (self.attention_norm(attended) + self.ssm_norm(scanned)) / 2
        return *self.out_proj(joined), context

    def _passed_on(self, key: Tensor, value: Tensor) -> Tensor | None:
        """Have keys and values ready for the layers that reuse them, or as one tensor.

        Where whole layers are computed again, what goes from one to another must be a tensor that
        the engine hands on: it knows such as the context of cross-attention.
        """
        if not self._is_reused:
            return None
        if self._recomputes and self.training:
            return torch.cat((key.flatten(2), value.flatten(2)), dim=-1)
        self._kept = key, value
        return None

    def _reused(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys `[s, b, g, c]` and values `[s, b, g, v]` of the other layer."""
        if self._recomputes and self.training:
            assert context is not None
            widths = [self.groups * self.channels, self.groups * self.value_channels]
            k, v = context.split(widths, dim=-1)
            return k.unflatten(-1, (self.groups, -1)), v.unflatten(-1, (self.groups, -1))
        (producer,) = self._producer
        kept = producer._kept
        assert kept is not None
        if self._is_last:
            producer._kept = None
        return kept

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed_seq_params: PackedSeqParams | None
    ) -> Tensor:
        """`[s, b, n, c]` and keys and values -> `[s, b, n * v]`."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended: Tensor = self.core_attention(
                query, key, value, packed_seq_params=packed_seq_params
            )
            return attended

        if self.recompute_core_attention and self.training:
            attended: Tensor = checkpoint(attend, False, query, key, value)
            return attended
        return attend(query, key, value)

    def _rotated(self, heads: Tensor, rotary_pos_emb: Tensor | None) -> Tensor:
        if rotary_pos_emb is None:
            return heads
        turned: Tensor = apply_rotary_pos_emb(
            heads, rotary_pos_emb, config=self.config, cp_group=self.cp_group
        )
        return turned


class SharedHeads(TwoMixers):
    """x + mixer(norm(x)), the norm being the mixer's, and attention too.

    Forward: `[s, b, h]` -> (`[s, b, h]`, context).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        context: Tensor | None = None,
        **unused: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, twice.

        Args:
            hidden_states: `[s, b, h]`.
            attention_mask: not used, as attention has one of its own.
            rotary_pos_emb: the angles of RoPE, `[s, 1, 1, rotated channels]`; None: none.
            packed_seq_params: which document a token is of, where rows hold several.
            context: of layers that are computed again: keys and values to reuse, `[s, b, any]`.
            unused: what the engine tells its own layers beside these.
        """
        *output, passed_on = self.mixer(
            hidden_states, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params,
            context=context,
        )  # fmt: skip
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(tuple(output), hidden_states, self.hidden_dropout), passed_on


def share_keys_and_values(layers: Iterable[nn.Module]) -> None:
    """Have layers that reuse keys and values find those of the nearest such layer before."""
    groups: list[list[SharedHeadsMixer]] = []
    for mixer in (layer.mixer for layer in layers if isinstance(layer, SharedHeads)):
        if mixer.reuse_kv:
            groups[-1].append(mixer)
        else:
            groups.append([mixer])
    for producer, *others in groups:
        for each in others:
            each.reuse_of(producer, is_last=each is others[-1])
