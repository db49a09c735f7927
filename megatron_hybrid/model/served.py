"""What serves each part of the model, by backend: tests hold it against what is installed."""

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple


class Served(NamedTuple):
    """What serves a part of the model, as `module:name`, and who takes it up.

    Attributes:
        torch: on the torch backend.
        transformer_engine: on the transformer_engine backend.
        by: "specs" where `model.specs` hands it to the engine; else the place that chooses it.
    """

    torch: str
    transformer_engine: str
    by: str = "specs"


_TE = "megatron.core.extensions.transformer_engine"
_CORE = "megatron.core"
_OURS = "megatron_hybrid"
# Names are looked up when a model is built: the packages of a GPU are not needed to read them.
SERVED: dict[str, Served] = {
    "model": Served(
        f"{_OURS}.model.hybrid:HybridModel", f"{_OURS}.model.prediction:PredictingModel"
    ),
    "stack": Served(
        f"{_OURS}.model.hybrid:HybridStack", f"{_CORE}.models.hybrid.hybrid_block:HybridStack"
    ),
    "norm": Served(f"{_OURS}.layers.norm:RMSNorm", f"{_TE}:TENorm"),
    "norm_and_column_linear": Served(
        f"{_OURS}.layers.linear:LayerNormColumnParallelLinear",
        f"{_TE}:TELayerNormColumnParallelLinear",
    ),
    # Where several linears share a norm, it is a layer of its own before them.
    "column_linear": Served(
        f"{_OURS}.layers.linear:ColumnParallelLinear", f"{_TE}:TEColumnParallelLinear"
    ),
    "row_linear": Served(f"{_OURS}.layers.linear:RowParallelLinear", f"{_TE}:TERowParallelLinear"),
    "core_attention": Served(
        f"{_OURS}.layers.attention:DotProductAttention", f"{_TE}:TEDotProductAttention"
    ),
    "mamba_mixer": Served(
        f"{_OURS}.layers.mamba2:Mamba2Mixer", f"{_OURS}.layers.mamba2:Mamba2Mixer"
    ),
    "mamba1_mixer": Served(
        f"{_OURS}.layers.mamba1:Mamba1Mixer", f"{_OURS}.layers.mamba1:Mamba1Mixer"
    ),
    "mamba1_scan": Served(
        f"{_OURS}.ops.selective_scan.torch_chunked:selective_scan_torch",
        "mamba_ssm.ops.selective_scan_interface:selective_scan_fn",
        "ops.selective_scan, by the mixer's kernel",
    ),
    "mamba1_conv1d": Served(
        f"{_OURS}.ops.causal_conv1d:causal_conv1d",
        f"{_OURS}.ops.causal_conv1d:causal_conv1d",
        "layers.mamba1",
    ),
    "gated_delta_net": Served(
        f"{_OURS}.layers.gated_delta_net:GatedDeltaNet",
        f"{_OURS}.layers.gated_delta_net:GatedDeltaNet",
    ),
    "gated_delta_rule": Served(
        f"{_OURS}.ops.gated_delta.torch_chunked:gated_delta_torch",
        f"{_OURS}.ops.gated_delta.torch_chunked:gated_delta_torch",
        "layers.gated_delta_net",
    ),
    "mamba_scan": Served(
        f"{_OURS}.ops.mamba2_fused:fused_core",
        "mamba_ssm.ops.triton.ssd_combined:mamba_split_conv1d_scan_combined",
        "ops.mamba2, by the mixer's kernel",
    ),
    "causal_conv1d": Served(
        f"{_OURS}.ops.mamba2_fused:fused_core",
        "causal_conv1d:causal_conv1d_fn",
        "within mamba_scan: its kernel calls it",
    ),
    "moe_layer": Served(
        f"{_OURS}.layers.moe:MoELayer",
        f"{_CORE}.transformer.moe.moe_layer:MoELayer",
    ),
    "moe_latent_projections": Served(
        f"{_OURS}.layers.linear:WholeLinear", f"{_TE}:TELinear", "moe_layer"
    ),
    "moe_router": Served(f"{_OURS}.layers.router:TopKRouter", f"{_OURS}.layers.router:TopKRouter"),
    "moe_dispatcher": Served(
        f"{_CORE}.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher",
        f"{_CORE}.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher",
        "the engine's MoELayer, by model.moe_token_dispatcher_type",
    ),
    "moe_experts": Served(
        f"{_CORE}.transformer.moe.experts:SequentialMLP",
        f"{_CORE}.transformer.moe.experts:TEGroupedMLP",
        "the engine's MoE spec",
    ),
    "moe_expert_column_linear": Served(
        f"{_OURS}.layers.linear:ColumnParallelLinear",
        f"{_TE}:TEColumnParallelGroupedLinear",
        "the engine's MoE spec",
    ),
    "moe_expert_row_linear": Served(
        f"{_OURS}.layers.linear:RowParallelLinear",
        f"{_TE}:TERowParallelGroupedLinear",
        "the engine's MoE spec",
    ),
    "embedding": Served(
        f"{_CORE}.models.common.embeddings.language_model_embedding:LanguageModelEmbedding",
        f"{_CORE}.models.common.embeddings.language_model_embedding:LanguageModelEmbedding",
        "model",
    ),
    "output_layer": Served(
        f"{_OURS}.layers.linear:parallel_linear",
        f"{_CORE}.tensor_parallel.layers:ColumnParallelLinear",
        "model",
    ),
    "padding_of_logits": Served(
        f"{_OURS}.layers.vocabulary:leave_out_padding",
        f"{_OURS}.layers.vocabulary:leave_out_padding",
        "build_model, on the output layer",
    ),
    "cross_entropy": Served(
        f"{_OURS}.layers.cross_entropy:vocab_parallel_cross_entropy",
        f"{_CORE}.tensor_parallel.cross_entropy:vocab_parallel_cross_entropy",
        "model; on GPUs gpu.cross_entropy_loss_fusion chooses the engine's fused one",
    ),
    "final_norm": Served(f"{_OURS}.layers.norm:RMSNorm", f"{_TE}:TENorm", "stack"),
    "optimizer": Served(
        f"{_OURS}.platform.adam:Adam",
        "transformer_engine.pytorch.optimizers:FusedAdam",
        "the engine's get_megatron_optimizer",
    ),
}


@cache
def served(part: str, backend: str) -> Any:
    """The class or function that serves a part of the model, imported.

    Raises:
        ImportError: a package that it needs is not installed.
    """
    module, _, name = getattr(SERVED[part], backend).partition(":")
    return getattr(import_module(module), name)
