"""Which class serves which layer, by backend: the table that megatron-core builds the stack from.

Symbols of the pattern: M Mamba-2, * attention, - MLP, E mixture of experts.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import (
    get_moe_module_spec,
    get_moe_module_spec_for_backend,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack as EngineHybridStack
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel as EngineHybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_hybrid.layers.attention import DotProductAttention
from megatron_hybrid.layers.linear import (
    ColumnParallelLinear,
    LayerNormColumnParallelLinear,
    RowParallelLinear,
)
from megatron_hybrid.layers.mamba2 import Mamba2Mixer, Mamba2MixerSubmodules
from megatron_hybrid.layers.norm import RMSNorm
from megatron_hybrid.layers.router import TopKRouter
from megatron_hybrid.model.hybrid import HybridModel, HybridStack
from megatron_hybrid.ops.ssd import SSDBackend


class LayerClasses(NamedTuple):
    """What differs between the backends."""

    model: type[EngineHybridModel]
    stack: type[EngineHybridStack]
    norm: type
    norm_and_column_linear: type
    row_linear: type
    core_attention: type
    mamba_kernel: SSDBackend
    moe: Any


class _TorchMoe(LocalSpecProvider):
    """The engine's mixture of experts, one expert after the other, on our linears."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial[SequentialMLP]:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(SequentialMLP, submodules=linears)


def _with_our_router(moe: partial[Any]) -> partial[Any]:
    """The engine's MoE layer with `layers.router.TopKRouter`, on both backends."""
    submodules = replace(moe.keywords["submodules"], router=TopKRouter)
    return partial(moe.func, submodules=submodules)


def layer_classes(backend: str) -> LayerClasses:
    """The classes of a backend: "torch" (any device) or "transformer_engine" (CUDA)."""
    if backend == "torch":
        return LayerClasses(
            model=HybridModel,
            stack=HybridStack,
            norm=RMSNorm,
            norm_and_column_linear=LayerNormColumnParallelLinear,
            row_linear=RowParallelLinear,
            core_attention=DotProductAttention,
            mamba_kernel="torch",
            moe=_with_our_router(get_moe_module_spec_for_backend(_TorchMoe(), num_experts=1)),
        )
    from megatron.core.extensions import transformer_engine as te

    return LayerClasses(
        model=EngineHybridModel,
        stack=EngineHybridStack,
        norm=te.TENorm,
        norm_and_column_linear=te.TELayerNormColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        core_attention=te.TEDotProductAttention,
        mamba_kernel="mamba_ssm",
        moe=_with_our_router(
            get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=True)
        ),
    )


def hybrid_stack_spec(backend: str) -> ModuleSpec:
    """The stack of layers for megatron-core's HybridModel."""
    classes = layer_classes(backend)
    mamba = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(
                module=Mamba2Mixer,
                params={"kernel": classes.mamba_kernel},
                submodules=Mamba2MixerSubmodules(
                    in_proj=classes.norm_and_column_linear, out_proj=classes.row_linear
                ),
            ),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=classes.norm_and_column_linear,
                    core_attention=classes.core_attention,
                    linear_proj=classes.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    mlp = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=classes.norm_and_column_linear, linear_fc2=classes.row_linear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    moe = ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=classes.norm, mlp=classes.moe, mlp_bda=get_bias_dropout_add
        ),
    )
    return ModuleSpec(
        module=classes.stack,
        submodules=HybridStackSubmodules(
            mamba_layer=mamba, attention_layer=attention, mlp_layer=mlp, moe_layer=moe
        ),
    )
