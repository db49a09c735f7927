"""megatron-core's own hybrid model, optimizer, schedules and checkpoints, as a rank runs them.

Layers are the engine's local ones, with our norms: these tests hold the platform.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_hybrid.layers.norm import RMSNorm
from megatron_hybrid.model.hybrid import HybridStack
from megatron_hybrid.testing import init_model_parallel

VOCAB_SIZE, SEQ_LENGTH, BATCH = 64, 16, 4
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Layout:
    """How the toy run is spread over ranks, and what else is special about it."""

    world_size: int = 1
    sizes: dict[str, int] = field(default_factory=dict)
    pattern: str = "*-*E"
    config: dict = field(default_factory=dict)
    ddp: dict = field(default_factory=dict)
    optimizer: dict = field(default_factory=dict)


@dataclass
class Run:
    """One rank of the toy run."""

    layout: Layout
    config: TransformerConfig
    chunks: list[DistributedDataParallel]
    optimizer: object


def build(layout: Layout) -> Run:
    """Process groups, model chunks under DDP, and the optimizer, on this rank."""
    init_model_parallel(seed=7, **layout.sizes)
    config = TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        num_moe_experts=4,
        moe_ffn_hidden_size=64,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=0.0,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        normalization="RMSNorm",
        persist_layer_norm=False,
        batch_p2p_comm=False,
        pipeline_dtype=layout.config.get("params_dtype", torch.float32),
        use_cpu_initialization=True,
        tensor_model_parallel_size=layout.sizes.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=layout.sizes.get("pipeline_model_parallel_size", 1),
        virtual_pipeline_model_parallel_size=layout.sizes.get(
            "virtual_pipeline_model_parallel_size"
        ),
        expert_model_parallel_size=layout.sizes.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=1,
        attention_softmax_in_fp32=True,
        **{"hidden_dropout": 0.0, "attention_dropout": 0.0, **layout.config},
    )
    stages = layout.sizes.get("virtual_pipeline_model_parallel_size") or 1
    chunks = []
    for stage in range(stages):
        vp_stage = stage if stages > 1 else None
        model = HybridModel(
            config,
            stack_spec(),
            vocab_size=VOCAB_SIZE,
            max_sequence_length=SEQ_LENGTH,
            hybrid_layer_pattern=layout.pattern,
            pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
            vp_stage=vp_stage,
        ).to(config.params_dtype)
        ddp = DistributedDataParallelConfig(
            **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **layout.ddp}
        )
        chunks.append(DistributedDataParallel(config, ddp, model))
    config.finalize_model_grads_func = finalize_model_grads
    if layout.ddp.get("overlap_grad_reduce"):
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = config.no_sync_func if stages > 1 else config.no_sync_func[0]
    options = {"use_distributed_optimizer": True, "lr": 1e-2, "clip_grad": 0.5}
    options |= {"params_dtype": config.params_dtype, "bf16": config.bf16} | layout.optimizer
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", weight_decay=0.1, **options),
        chunks,
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    return Run(layout, config, chunks, optimizer)


def stack_spec() -> ModuleSpec:
    """Attention, MLP and MoE layers made of what the engine has for any device."""
    linears = {
        "linear_fc1": LocalSpecProvider().column_parallel_linear(),
        "linear_fc2": LocalSpecProvider().row_parallel_linear(),
    }
    attention = ModuleSpec(
        SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LocalSpecProvider().column_parallel_linear(),
            core_attention=LocalSpecProvider().core_attention(),
            linear_proj=LocalSpecProvider().row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=RMSNorm,
                    self_attention=attention,
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=RMSNorm,
                    mlp=partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(**linears)),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            moe_layer=ModuleSpec(
                MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=RMSNorm,
                    mlp=get_moe_module_spec(use_te=False, num_experts=4),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


def train(run: Run, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, the same on all ranks; sample i is a function of i."""
    group = parallel_state.get_data_parallel_group()
    replicas, replica = group.size(), group.rank()
    history = []
    for step in steps:
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        samples = [step * BATCH + replica + i * replicas for i in range(BATCH // replicas)]
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(samples) for _ in run.chunks],
            model=run.chunks,
            num_microbatches=len(samples),
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = run.optimizer.step()
        total = torch.zeros(())
        for loss in losses:
            total += loss["loss"] / BATCH
        torch.distributed.all_reduce(total, group=group)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_reduce(total, group=pipeline)
        history.append((total.item(), float(norm)))
    return history


def _forward_step(data_iterator, model):
    generator = torch.Generator().manual_seed(next(data_iterator))
    tokens = torch.randint(VOCAB_SIZE, (1, SEQ_LENGTH + 1), generator=generator)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask = torch.ones(1, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).triu(1)
    output = model(inputs, torch.arange(SEQ_LENGTH)[None], mask, labels=labels)

    def loss(token_losses):
        mean = token_losses.float().mean()
        return mean, {"loss": mean.detach().clone()}  # the schedule divides `mean` in place

    return output, loss


def model_state(run: Run) -> dict:
    """The sharded state of the model: its keys say which layers a chunk's tensors are of."""
    return {
        f"model{index}": chunk.module.sharded_state_dict(metadata=_metadata())
        for index, chunk in enumerate(run.chunks)
    }


def optimizer_state(run: Run, model: dict, *, to_load: bool = False) -> dict:
    """The sharded state of the optimizer; with `to_load` it is made anew, to be filled."""
    return run.optimizer.sharded_state_dict(model, is_loading=to_load, metadata=_metadata())


def _metadata() -> dict:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**METADATA, "dp_cp_group": group}


def save(run: Run, folder: str) -> None:
    """Write a checkpoint, all ranks together."""
    state = model_state(run)
    state["optimizer"] = optimizer_state(run, state)
    dist_checkpointing.save(state, folder, content_metadata=METADATA)


def start_saving(run: Run, folder: str) -> AsyncCallsQueue:
    """Start to write a checkpoint in the background."""
    state = model_state(run)
    state["optimizer"] = optimizer_state(run, state)
    request = dist_checkpointing.save(
        state,
        folder,
        content_metadata=METADATA,
        async_sharded_save=True,
        async_strategy="mcore",
    )
    calls = AsyncCallsQueue()
    calls.schedule_async_request(request)
    return calls


def load(run: Run, folder: str, *, weights_only: bool = False) -> None:
    """Fill the model and, unless `weights_only`, the optimizer from a checkpoint of any layout."""
    state = model_state(run)
    if not weights_only:
        state["optimizer"] = optimizer_state(run, state, to_load=True)
    loaded = dist_checkpointing.load(state, folder)
    for index, chunk in enumerate(run.chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    if weights_only:
        run.optimizer.reload_model_params()
        return
    # The engine keeps one optimizer, or two where experts are spread otherwise than the rest. Its
    # tensors suit both; what it stores beside them suits the layout that saved: only `step` counts.
    saved, parts = loaded["optimizer"], run.optimizer.chained_optimizers
    groups = saved.get("optimizer", saved.get(0, {}).get("optimizer"))["param_groups"]
    for index, part in enumerate(parts):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = groups[0]["step"]
        tensors = saved[index]["param_state"] if len(parts) > 1 else saved["param_state"]
        part.load_state_dict(
            {
                **state,
                "param_state": tensors,
                "param_state_sharding_type": METADATA["distrib_optim_sharding_type"],
            }
        )
