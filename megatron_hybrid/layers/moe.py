"""megatron-core's mixture of experts with latent projections that need no Transformer Engine.

Latent experts (Nemotron 3, 2512.20856) get tokens of fewer channels: a layer projects each token
once before it is sent to its experts, and the sum of what they make once after. The router and the
shared expert see the whole token.

Legend: s sequence (of this rank), b batch, h hidden size, l latent size.
"""

import copy
from dataclasses import replace
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer as EngineMoELayer
from megatron.core.transformer.moe.moe_layer import MoESubmodules

from megatron_hybrid.layers.linear import WholeLinear


class MoELayer(EngineMoELayer):
    """The engine's; its own latent projections are Transformer Engine's, and its check asks for it.

    Parameters and checkpoint keys are the engine's: `fc1_latent_proj.weight` `[l, h]`,
    `fc2_latent_proj.weight` `[h, l]`, biases with `add_bias_linear`.

    Forward: `[s, b, h]` -> (`[s, b, h]`, None).
    """

    def __init__(
        self, config: TransformerConfig, submodules: MoESubmodules, *arguments: Any, **named: Any
    ) -> None:
        if not config.moe_latent_size:
            super().__init__(config, submodules, *arguments, **named)
            return
        whole = copy.copy(config)
        whole.moe_latent_size = None

        def latent_experts(count: int, _: TransformerConfig, **others: Any) -> Any:
            return submodules.experts(count, config, **others)

        super().__init__(whole, replace(submodules, experts=latent_experts), *arguments, **named)
        self.config = config
        sizes = config.hidden_size, config.moe_latent_size
        self.fc1_latent_proj = WholeLinear(*sizes, config, config.init_method)
        self.fc2_latent_proj = WholeLinear(*sizes[::-1], config, config.output_layer_init_method)
