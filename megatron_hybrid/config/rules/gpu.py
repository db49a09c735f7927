"""Rules of what only GPUs have: where it runs, and what each kernel and overlap needs."""

from megatron_hybrid.config.describe import shown
from megatron_hybrid.config.layers import layers_of, mamba_layers, shown_size
from megatron_hybrid.config.pattern import ATTENTION, GDN, MLP, MOE, PARALLEL
from megatron_hybrid.config.rules.common import (
    Facts,
    Problems,
    Rule,
    must_be_multiple,
    on_transformer_engine,
)
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.sections import GpuConfig

CONVOLVED_TOGETHER = 8  # channels, in causal-conv1d
MOST_SCANNED_STATES = 256  # in mamba-ssm's selective scan
_CONVOLVED = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")


def gpu_only(c: RunConfig, facts: Facts) -> Problems:
    """The torch backend has one kernel for each thing; nothing here chooses among its."""
    if not (c.backend == "torch" or (c.backend == "auto" and facts.has_cuda is False)):
        return
    for name, field in GpuConfig.model_fields.items():
        value, default = getattr(c.gpu, name), field.default
        if value == default or (name == "cp_comm_type" and value == "all_gather"):
            continue
        allowed = "null, all_gather" if name == "cp_comm_type" else _typed(default)
        yield (
            f"gpu.{name}={_typed(value)} needs the transformer_engine backend, and this run has "
            f"torch's; allowed here: {allowed}"
        )


def context_parallel_communication(c: RunConfig, _: Facts) -> Problems:
    """All-to-all gives each CP rank whole heads and groups of attention."""
    tp, cp = c.parallel.tensor_model_parallel_size, c.parallel.context_parallel_size
    if c.gpu.cp_comm_type != "a2a" or cp == 1:
        return
    for name in ("num_attention_heads", "num_query_groups"):
        for layer in layers_of(c.model, ATTENTION):
            size = getattr(layer.model, name)
            if size is not None:
                yield from must_be_multiple(
                    f"gpu.cp_comm_type=a2a: {layer.path(name)}", size,
                    "parallel.tensor_model_parallel_size * parallel.context_parallel_size", tp * cp,
                )  # fmt: skip


def overlapping(c: RunConfig, _: Facts) -> Problems:
    """An overlap needs what it overlaps with."""
    gpu, parallel = c.gpu, c.parallel
    if gpu.overlap_p2p_comm and parallel.virtual_pipeline_model_parallel_size is None:
        yield (
            "gpu.overlap_p2p_comm=true needs an interleaved pipeline: more segments in "
            "model.hybrid_layer_pattern than "
            f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}; "
            "allowed: false"
        )
    if gpu.align_param_gather and not parallel.overlap_param_gather:
        yield ("gpu.align_param_gather=true needs parallel.overlap_param_gather=true; it is false")


def experts(c: RunConfig, _: Facts) -> Problems:
    """Kernels of the experts need experts, and those beside them shared ones."""
    if c.gpu.moe_router_fusion and c.upcycling.source is not None:
        yield (
            "gpu.moe_router_fusion=true with upcycling.from is not supported: experts begin as "
            "copies, and of equal scores the fused router takes any; allowed: false"
        )
    names = ("moe_permute_fusion", "moe_router_fusion", "moe_shared_expert_overlap")
    for name in names:
        if getattr(c.gpu, name) and MOE not in c.model.hybrid_layer_pattern:
            yield f"gpu.{name}=true needs 'E' layers in model.hybrid_layer_pattern; allowed: false"
            continue
        if name != "moe_shared_expert_overlap" or not c.gpu.moe_shared_expert_overlap:
            continue
        for layer in layers_of(c.model, MOE):
            if layer.model.moe_shared_expert_intermediate_size is None:
                yield (
                    f"gpu.{name}=true needs {layer.path('moe_shared_expert_intermediate_size')}, "
                    "which is null; allowed: false"
                )
            if layer.model.moe_latent_size is not None:
                yield (
                    f"gpu.{name}=true with {layer.path('moe_latent_size')}="
                    f"{layer.model.moe_latent_size} is not supported: megatron-core would compute "
                    "shared experts on latent tokens; allowed: false"
                )
        if c.model.moe_token_dispatcher_type != "alltoall":
            yield (
                f"gpu.{name}=true needs model.moe_token_dispatcher_type=alltoall; it is "
                f"{c.model.moe_token_dispatcher_type}"
            )


def convolved_channels(c: RunConfig, facts: Facts) -> Problems:
    """causal-conv1d takes channels by eight; where ranks do not get equal parts, that is told."""
    tp, cp = c.parallel.tensor_model_parallel_size, c.parallel.context_parallel_size
    if not on_transformer_engine(c, facts):
        return
    for layer in mamba_layers(c.model, 2):
        m = layer.model
        if m.mamba_num_heads is None or m.mamba_num_heads % (tp * cp) or m.mamba_num_groups % tp:
            continue
        # Where CP exceeds the groups of a TP rank, several ranks have the same one.
        groups = max(m.mamba_num_groups // (tp * cp), 1)
        inner = m.mamba_num_heads * m.mamba_head_dim
        channels = inner // (tp * cp) + 2 * groups * m.mamba_state_dim
        if channels % CONVOLVED_TOGETHER:
            *first, last = (f"{layer.path(name)}={getattr(m, name)}" for name in _CONVOLVED)
            yield (
                f"{', '.join(first)} and {last} make {channels} convolved channels on a "
                f"rank, which must be a multiple of {CONVOLVED_TOGETHER} on the transformer_engine "
                "backend"
            )


def selective_scan_states(c: RunConfig, facts: Facts) -> Problems:
    """mamba-ssm's kernel keeps a channel's states in registers, and has so many of them."""
    if not on_transformer_engine(c, facts):
        return
    for layer in mamba_layers(c.model, 1):
        if layer.model.mamba_state_dim > MOST_SCANNED_STATES:
            yield (
                f"{layer.path('mamba_state_dim')}={layer.model.mamba_state_dim} must be at most "
                f"{MOST_SCANNED_STATES} in a Mamba-1 layer on the transformer_engine backend"
            )


def attention_kernels(c: RunConfig, facts: Facts) -> Problems:
    """Attention of Transformer Engine is asked for values as wide as keys, and the usual masks."""
    if not on_transformer_engine(c, facts):
        return
    if c.model.num_meta_tokens:
        yield (
            f"model.num_meta_tokens={c.model.num_meta_tokens} is not supported on the "
            "transformer_engine backend, whose attention has no mask for them; allowed: 0, or "
            "backend=torch"
        )
    if c.model.parallel_heads_join == "mean":
        yield (
            "model.parallel_heads_join=mean is not supported on the transformer_engine backend: "
            "its values have other channels than its keys; allowed: sum, or backend=torch"
        )


def fusions(c: RunConfig, facts: Facts) -> Problems:
    """Which fused kernels there are."""
    lacks_apex = facts.fused_weight_gradients is False and on_transformer_engine(c, facts)
    if c.gpu.gradient_accumulation_fusion and lacks_apex:
        yield (
            "gpu.gradient_accumulation_fusion=true needs NVIDIA's apex with its extension "
            "fused_weight_gradient_mlp_cuda, which cannot be imported here; allowed: false"
        )
    bias = c.model.add_bias_linear
    activations = {
        layer.path("activation"): layer.model.activation
        for kind in (MLP, MOE)
        for layer in layers_of(c.model, kind)
    } or {"model.activation": c.model.activation}
    for path, activation in activations.items():
        fused = activation == "swiglu" or (activation == "gelu" and bias)
        if c.gpu.bias_activation_fusion and not fused:
            yield (
                f"gpu.bias_activation_fusion=true has no kernel for {path}={activation} "
                f"with model.add_bias_linear={shown(bias)}; allowed: false, or swiglu, or gelu "
                "with bias"
            )
    if c.gpu.bias_activation_fusion and c.model.mlp_multipliers[0] != 1:
        yield (
            "gpu.bias_activation_fusion=true has no kernel for model.mlp_multipliers="
            f"{shown_size(c.model.mlp_multipliers)}; allowed: false, or a first one of 1.0"
        )
    if c.gpu.cross_entropy_fusion_impl != "native" and not c.gpu.cross_entropy_loss_fusion:
        yield (
            f"gpu.cross_entropy_fusion_impl={c.gpu.cross_entropy_fusion_impl} needs "
            "gpu.cross_entropy_loss_fusion=true; it is false"
        )


def cuda_graphs(c: RunConfig, _: Facts) -> Problems:
    """Graphs replay the same shapes and hold no recomputation of whole layers."""
    gpu = c.gpu
    modules, listed = gpu.cuda_graph_modules, _typed(gpu.cuda_graph_modules)
    if gpu.cuda_graph_impl == "none":
        if modules:
            yield (f"gpu.cuda_graph_modules={listed} needs gpu.cuda_graph_impl=local; it is none")
        return
    if c.data.packed_documents:
        yield (
            "gpu.cuda_graph_impl=local with data.packed_documents=true is not supported: "
            "documents differ from row to row; allowed: none, or data.packed_documents=false"
        )
    if c.training.recompute_granularity == "full":
        yield (
            "gpu.cuda_graph_impl=local with training.recompute_granularity=full is not supported; "
            "allowed: none, or selective"
        )
    for kind in (each for each in (PARALLEL, GDN) if each in c.model.hybrid_layer_pattern):
        yield (
            f"gpu.cuda_graph_impl=local with {kind!r} layers in model.hybrid_layer_pattern="
            f"{c.model.hybrid_layer_pattern!r} is not supported; allowed: none"
        )
    if graphed := [name for name in c.training.recompute_modules if name != "core_attn"]:
        yield (
            "gpu.cuda_graph_impl=local with training.recompute_modules="
            f"[{', '.join(graphed)}] is not supported; allowed: none, or core_attn"
        )
    if MOE in c.model.hybrid_layer_pattern and (not modules or "moe" in modules):
        yield (
            f"gpu.cuda_graph_modules={listed} would hold whole MoE layers, where the "
            "number of an expert's tokens varies; allowed: attn, mlp, mamba, moe_router, "
            "moe_preprocess"
        )
    if "moe_preprocess" in modules and "moe_router" not in modules:
        yield (f"gpu.cuda_graph_modules={listed}: moe_preprocess needs moe_router beside it")


def _typed(value: object) -> str:
    """A value as one types it."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return value if isinstance(value, str) else shown(value)


GPU: tuple[Rule, ...] = (
    gpu_only,
    context_parallel_communication,
    overlapping,
    experts,
    convolved_channels,
    selective_scan_states,
    attention_kernels,
    fusions,
    cuda_graphs,
)
