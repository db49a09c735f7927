"""Attention and Mamba side by side: both read one normed input, and their outputs are joined.

Legend: s sequence (of this rank), b batch, h hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor


@dataclass(frozen=True)
class JoinFactors:
    """What the mixers' inputs and outputs are multiplied with; Mamba-2's input in the mixer."""

    attention_in: float = 1.0
    attention_out: float = 1.0
    ssm_out: float = 1.0
    ssm_in: float = 1.0


@dataclass
class ParallelHeadsSubmodules(TransformerLayerSubmodules):
    """Of a layer: `input_layernorm` is before both mixers, whose linears have none."""

    mixer: ModuleSpec | type = field(default=IdentityOp)


class TwoMixers(TransformerLayer):
    """A layer with a Mamba mixer, `mixer`, beside attention.

    In the engine's stack it stands in the place of an attention layer, as it needs the angles of
    RoPE.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelHeadsSubmodules,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        **named: Any,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            pp_layer_offset=pp_layer_offset,
            name=name,
            **named,
        )
        self.mixer = build_module(
            submodules.mixer,
            self.config,
            d_model=self.config.hidden_size,
            layer_number=self.layer_number,
            pg_collection=self.pg_collection,
            pp_layer_offset=pp_layer_offset or 0,
            name=f"{name}.mixer" if name is not None else None,
        )


class ParallelHeads(TwoMixers):
    """x + attention_out * attention(attention_in * norm(x)) + ssm_out * mixer(ssm_in * norm(x)).

    Its parts are named as those of the layers that have one mixer: `self_attention`, `mixer`.

    Forward: `[s, b, h]` -> (`[s, b, h]`, None).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelHeadsSubmodules,
        factors: JoinFactors,
        **named: Any,
    ) -> None:
        super().__init__(config, submodules, **named)
        self.factors = factors

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """Mix along the sequence, twice.

        Args:
            hidden_states: `[s, b, h]`.
            attention_mask: not used, as attention has one of its own.
            rotary_pos_emb: the angles of RoPE; None: none.
            packed_seq_params: which document a token is of, where rows hold several.
            unused: what the engine tells its own layers beside these.
        """
        factors = self.factors
        normed = self.input_layernorm(hidden_states)
        attended, bias = self.self_attention(
            normed if factors.attention_in == 1 else normed * factors.attention_in,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        mixed, _ = self.mixer(
            normed if factors.ssm_in == 1 else normed * factors.ssm_in,
            packed_seq_params=packed_seq_params,
        )
        if factors.attention_out != 1:
            attended = attended * factors.attention_out
            bias = None if bias is None else bias * factors.attention_out
        joined = torch.add(attended, mixed, alpha=factors.ssm_out)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add((joined, bias), hidden_states, self.hidden_dropout), None


class ByNumber:
    """In one place of the engine's stack layers of several kinds, each by its number.

    Args:
        kinds: of the layers that are not of the engine's own kind, by number.
        specs: of each kind; under None the engine's.
    """

    def __new__(
        cls,
        *,
        layer_number: int,
        kinds: dict[int, str],
        specs: dict[str | None, ModuleSpec],
        **named: Any,
    ) -> Any:
        return build_module(specs[kinds.get(layer_number)], layer_number=layer_number, **named)
