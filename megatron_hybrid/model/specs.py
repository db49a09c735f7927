"""Specs of the layers that megatron-core builds the stack from, on either backend.

Symbols of the pattern: M Mamba-1 or Mamba-2, * attention, - MLP, E mixture of experts, H attention
and Mamba side by side, G gated delta net.
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
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MAMBA, PARALLEL, parse_pattern
from megatron_hybrid.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_hybrid.layers.mamba import MambaMixerSubmodules
from megatron_hybrid.layers.multipliers import scaled_bias_dropout_add
from megatron_hybrid.layers.parallel_heads import (
    ByNumber,
    JoinFactors,
    ParallelHeads,
    ParallelHeadsSubmodules,
)
from megatron_hybrid.layers.router import TopKRouter
from megatron_hybrid.layers.shared_heads import (
    SharedHeads,
    SharedHeadsMixer,
    SharedHeadsMixerSubmodules,
)
from megatron_hybrid.model.prediction import PredictionLayer
from megatron_hybrid.model.served import served
from megatron_hybrid.ops.ssd import SSDBackend


class _TorchMoe(LocalSpecProvider):
    """The engine's mixture of experts, one expert after the other, on our linears."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial[SequentialMLP]:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(SequentialMLP, submodules=linears)


def _moe(backend: str) -> partial[Any]:
    """The engine's MoE layer with our router, on both backends."""
    if backend == "torch":
        moe = get_moe_module_spec_for_backend(_TorchMoe(), num_experts=1)
    else:
        moe = get_moe_module_spec(use_te=True, num_experts=1, moe_grouped_gemm=True)
    assert isinstance(moe, partial)
    submodules = replace(moe.keywords["submodules"], router=TopKRouter)
    return partial(served("moe_layer", backend), submodules=submodules)


class LayerClasses(NamedTuple):
    """The rows of `SERVED` that are handed to the engine, looked up."""

    model: type[EngineHybridModel]
    stack: type[EngineHybridStack]
    norm: type
    norm_and_column_linear: type
    column_linear: type
    row_linear: type
    core_attention: type
    mamba_mixer: type
    mamba1_mixer: type
    gated_delta_net: type
    mamba_kernel: SSDBackend
    moe: Any


def layer_classes(backend: str) -> LayerClasses:
    """The classes of a backend: "torch" (any device) or "transformer_engine" (CUDA)."""
    parts = ("model", "stack", "norm", "norm_and_column_linear", "column_linear", "row_linear",
             "core_attention", "mamba_mixer", "mamba1_mixer", "gated_delta_net")  # fmt: skip
    return LayerClasses(
        **{part: served(part, backend) for part in parts},
        mamba_kernel="torch" if backend == "torch" else "mamba_ssm",
        moe=_moe(backend),
    )


def _of_sequences(model: ModelConfig, state_passing: bool) -> dict[str, Any]:
    """What every mixer with a state is told of sequences, where it is not as usual."""
    told = {"num_meta_tokens": model.num_meta_tokens, "state_passing": state_passing}
    return {name: value for name, value in told.items() if value}


def _mamba_mixer(
    classes: LayerClasses, model: ModelConfig, in_proj: type, factor: float, state_passing: bool
) -> ModuleSpec:
    """A Mamba-2 mixer whose input is multiplied with a factor: there is no bias in its way."""
    params = {"kernel": classes.mamba_kernel, **_of_sequences(model, state_passing)}
    if not model.mamba_rms_norm:
        params["gated_norm"] = False
    multipliers = tuple(factor * each for each in model.ssm_multipliers)
    if any(each != 1 for each in multipliers):
        params["multipliers"] = multipliers
    return ModuleSpec(
        module=classes.mamba_mixer,
        params=params,
        submodules=MambaMixerSubmodules(in_proj=in_proj, out_proj=classes.row_linear),
    )


def mamba_mixer_spec(
    backend: str, model: ModelConfig, kind: str = MAMBA, *, state_passing: bool = False
) -> ModuleSpec:
    """The mixer of layers with Mamba that have the sizes of `model`.

    Args:
        state_passing: how context-parallel ranks share a sequence; false: by an all-to-all.
    """
    classes = layer_classes(backend)
    if kind == PARALLEL and model.parallel_heads_join == "mean":
        return _shared_heads_mixer(classes, model, state_passing)
    # The norm is in the linear, or before those of both mixers.
    in_proj = classes.norm_and_column_linear if kind == MAMBA else classes.column_linear
    if model.mamba_version == 2:
        factor = model.ssm_in_multiplier if kind == PARALLEL else 1.0
        return _mamba_mixer(classes, model, in_proj, factor, state_passing)
    return ModuleSpec(
        module=classes.mamba1_mixer,
        params=_mamba1_params(classes, model, state_passing),
        submodules=MambaMixerSubmodules(in_proj=in_proj, out_proj=classes.row_linear),
    )


def _mamba1_params(
    classes: LayerClasses, model: ModelConfig, state_passing: bool
) -> dict[str, Any]:
    params = {
        "kernel": classes.mamba_kernel,
        "intermediate_size": model.mamba_intermediate_size,
        "dt_rank": model.mamba_dt_rank,
        **_of_sequences(model, state_passing),
    }
    return params | ({"inner_layernorms": True} if model.mamba_inner_layernorms else {})


def _core_attention(classes: LayerClasses, model: ModelConfig) -> Any:
    metas = model.num_meta_tokens
    if not metas:
        return classes.core_attention
    return partial(classes.core_attention, num_meta_tokens=metas)


def _shared_heads_mixer(
    classes: LayerClasses, model: ModelConfig, state_passing: bool
) -> ModuleSpec:
    params = _mamba1_params(classes, model, state_passing)
    return ModuleSpec(
        module=SharedHeadsMixer,
        params=params | ({"reuse_kv": True} if model.reuse_kv else {}),
        submodules=SharedHeadsMixerSubmodules(
            in_proj=classes.norm_and_column_linear,
            out_proj=classes.row_linear,
            core_attention=_core_attention(classes, model),
        ),
    )


def _self_attention(classes: LayerClasses, model: ModelConfig, linear_qkv: type) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType[model.attn_mask_type]},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=_core_attention(classes, model),
            linear_proj=classes.row_linear,
        ),
    )


def join_factors(model: ModelConfig) -> JoinFactors:
    """Of parallel heads with the sizes of `model`."""
    return JoinFactors(
        model.attention_in_multiplier,
        model.attention_out_multiplier,
        model.ssm_out_multiplier,
        model.ssm_in_multiplier if model.mamba_version == 1 else 1.0,
    )


def _parallel_heads(backend: str, model: ModelConfig, state_passing: bool) -> ModuleSpec:
    classes = layer_classes(backend)
    mixer = mamba_mixer_spec(backend, model, PARALLEL, state_passing=state_passing)
    if model.parallel_heads_join == "mean":
        return ModuleSpec(
            module=SharedHeads,
            submodules=ParallelHeadsSubmodules(mixer=mixer, self_attn_bda=get_bias_dropout_add),
        )
    return ModuleSpec(
        module=ParallelHeads,
        params={"factors": join_factors(model)},
        submodules=ParallelHeadsSubmodules(
            input_layernorm=classes.norm,
            self_attention=_self_attention(classes, model, classes.column_linear),
            mixer=mixer,
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _prediction(classes: LayerClasses) -> ModuleSpec:
    """Modules of multi-token prediction; their layers are those of the stack."""
    submodules = MultiTokenPredictionLayerSubmodules(
        enorm=classes.norm, hnorm=classes.norm, layer_norm=classes.norm,
        eh_proj=classes.column_linear,
    )  # fmt: skip
    layer = ModuleSpec(module=PredictionLayer, submodules=submodules)
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )


def hybrid_stack_spec(
    backend: str, model: ModelConfig, *, state_passing: bool = False
) -> ModuleSpec:
    """The stack of layers for megatron-core's HybridModel; `state_passing` as for its mixers."""
    classes = layer_classes(backend)
    mamba = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=mamba_mixer_spec(backend, model, state_passing=state_passing),
            mamba_bda=get_bias_dropout_add,
        ),
    )
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_self_attention(classes, model, classes.norm_and_column_linear),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    gdn = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=classes.gated_delta_net,
                params=_of_sequences(model, state_passing),
                submodules=MambaMixerSubmodules(
                    in_proj=classes.norm_and_column_linear, out_proj=classes.row_linear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    in_its_place = {
        number: kind
        for number, kind in enumerate(parse_pattern(model.hybrid_layer_pattern).layers, start=1)
        if kind == PARALLEL
    }
    if in_its_place:
        specs = {None: attention, PARALLEL: _parallel_heads(backend, model, state_passing)}
        attention = ModuleSpec(module=ByNumber, params={"kinds": in_its_place, "specs": specs})
    mlp = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=classes.norm_and_column_linear, linear_fc2=classes.row_linear
                ),
            ),
            mlp_bda=scaled_bias_dropout_add(model.mlp_multipliers[1]),
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
            mamba_layer=mamba,
            gdn_layer=gdn,
            attention_layer=attention,
            mlp_layer=mlp,
            moe_layer=moe,
            mtp_block_spec=_prediction(classes),
        ),
    )  # fmt: skip
