"""Layers of unlike sizes: each is built from an engine's config of its own.

The engine's stack hands all layers the model's config. Where layers are unlike, these classes stand
before the engine's, and take the layer's own by its number.

Legend: s sequence (of this rank), c channels of a head that rotate.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import Tensor

from megatron_hybrid.config.layers import Layer, layers
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import PARALLEL
from megatron_hybrid.layers.parallel_heads import (
    ByNumber,
    JoinFactors,
    ParallelHeads,
    ParallelHeadsSubmodules,
)
from megatron_hybrid.layers.shared_heads import SharedHeads
from megatron_hybrid.model.specs import join_factors


class _OwnSizes:
    """Takes the config of its own number."""

    layer_number: int

    def __init__(
        self,
        *,
        config: TransformerConfig,
        own: Mapping[int, TransformerConfig],
        layer_number: int,
        **named: Any,
    ) -> None:
        super().__init__(config=own[layer_number], layer_number=layer_number, **named)  # type: ignore[call-arg]


class OwnMamba(_OwnSizes, MambaLayer):
    """A Mamba layer of its own sizes and version."""

    def __init__(
        self,
        *,
        mixers: Mapping[int, ModuleSpec],
        layer_number: int,
        submodules: MambaLayerSubmodules,
        **named: Any,
    ) -> None:
        submodules = replace(submodules, mixer=mixers[layer_number])
        super().__init__(layer_number=layer_number, submodules=submodules, **named)


class OwnGatedDeltaNet(_OwnSizes, TransformerLayer):
    """A gated delta net of its own sizes."""


class OwnMlp(_OwnSizes, MLPLayer):
    """An MLP of its own sizes."""


class OwnMoe(_OwnSizes, MoETransformerLayer):
    """A mixture of experts of its own sizes."""


class _OwnRotation(_OwnSizes):
    """Takes its own angles of RoPE, or none."""

    def __init__(self, *, rotations: Mapping[int, "Rotation"], **named: Any) -> None:
        super().__init__(**named)
        self.rotation = rotations[self.layer_number]

    def forward(self, *arguments: Any, rotary_pos_emb: Tensor | None = None, **named: Any) -> Any:
        """As the engine's; the angles `[s, 1, 1, c]` that it gets may be of other heads."""
        return super().forward(  # type: ignore[misc]
            *arguments, rotary_pos_emb=self.rotation.of_layer(rotary_pos_emb), **named
        )


class OwnAttention(_OwnRotation, TransformerLayer):
    """An attention layer of its own sizes."""


class _OwnHeads(_OwnRotation):
    """Takes its own Mamba mixer, too."""

    def __init__(
        self,
        *,
        mixers: Mapping[int, ModuleSpec],
        layer_number: int,
        submodules: ParallelHeadsSubmodules,
        **named: Any,
    ) -> None:
        submodules = replace(submodules, mixer=mixers[layer_number])
        super().__init__(layer_number=layer_number, submodules=submodules, **named)


class OwnParallelHeads(_OwnHeads, ParallelHeads):
    """Attention and Mamba of their own sizes, side by side."""

    def __init__(
        self, *, factors: Mapping[int, JoinFactors], layer_number: int, **named: Any
    ) -> None:
        super().__init__(factors=factors[layer_number], layer_number=layer_number, **named)


class OwnSharedHeads(_OwnHeads, SharedHeads):
    """The same with one projection to both, and one from both."""


class Rotation:
    """How the heads of an attention layer rotate, told by the angles of another layer's."""

    def __init__(self, layer: Layer) -> None:
        model = layer.model
        self.rotates = layer.rotates
        self.channels = int((model.kv_channels or 0) * model.rotary_percent)
        exponents = torch.arange(0, self.channels, 2, dtype=torch.float32, device="cpu")
        self._frequencies = 1.0 / model.rotary_base ** (exponents / max(self.channels, 1))

    def of_layer(self, angles: Tensor | None) -> Tensor | None:
        """`[s, 1, 1, any]` fp32, first those of one radian a token -> `[s, 1, 1, c]`, or None."""
        if angles is None or not self.rotates:
            return None
        if angles.shape[-1] == self.channels:
            return angles
        # Kept there: from the host it would come again at each step.
        self._frequencies = self._frequencies.to(angles.device)
        own = angles[..., :1] * self._frequencies
        return torch.cat((own, own), dim=-1)


def with_own_sizes(
    stack: ModuleSpec,
    model: ModelConfig,
    configs: Mapping[int, TransformerConfig],
    mixers: Mapping[int, ModuleSpec],
) -> ModuleSpec:
    """A stack's spec with layers that take their configs by number.

    Args:
        configs: of every layer, `model.transformer_config.layer_configs`.
        mixers: of every layer with Mamba.
    """
    kinds = stack.submodules
    rotations = {layer.number: Rotation(layer) for layer in layers(model)}

    def own(spec: ModuleSpec, module: type, **params: Any) -> ModuleSpec:
        return replace(spec, module=module, params={**spec.params, "own": configs, **params})

    attention = kinds.attention_layer
    if attention.module is ByNumber:
        specs = attention.params["specs"]
        heads = {"rotations": rotations, "mixers": mixers}
        if model.parallel_heads_join == "sum":
            factors = {layer.number: join_factors(layer.model) for layer in layers(model)}
            side_by_side = own(specs[PARALLEL], OwnParallelHeads, **heads, factors=factors)
        else:
            side_by_side = own(specs[PARALLEL], OwnSharedHeads, **heads)
        attention = replace(attention, params={
            **attention.params,
            "specs": {
                None: own(specs[None], OwnAttention, rotations=rotations),
                PARALLEL: side_by_side,
            },
        })  # fmt: skip
    else:
        attention = own(attention, OwnAttention, rotations=rotations)
    return replace(
        stack,
        submodules=replace(
            kinds,
            mamba_layer=own(kinds.mamba_layer, OwnMamba, mixers=mixers),
            attention_layer=attention,
            gdn_layer=own(kinds.gdn_layer, OwnGatedDeltaNet),
            mlp_layer=own(kinds.mlp_layer, OwnMlp),
            moe_layer=own(kinds.moe_layer, OwnMoe),
        ),
    )
