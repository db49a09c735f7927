"""The planner's memory against the tensors of real ranks: state to 1 %, activations to 2 %.

10 % would hide a tensor that is missing, or one that has another's size at these lengths.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megatron_hybrid.config import RunConfig, load_config
from megatron_hybrid.config.layers import sort_of_each
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.planner.activations import (
    dropout_mask,
    layer_activations,
    layer_input,
    output_activations,
    prediction_activations,
)
from megatron_hybrid.planner.layer_time import Features
from megatron_hybrid.planner.layout import layout_of
from megatron_hybrid.planner.memory import rank_memory
from megatron_hybrid.planner.parameters import stage_parameters
from megatron_hybrid.testing import run_distributed
from tests.distributed.layouts import built

SEQ_LENGTH = 512
MOE = ["model.num_moe_experts=8", "model.moe_ffn_hidden_size=320",
       "model.moe_shared_expert_intermediate_size=256"]  # fmt: skip


def run_config(pattern: str, *more: str, world_size: int = 1) -> RunConfig:
    return load_config(
        [
            f"model.hybrid_layer_pattern={pattern}", "model.hidden_size=256",
            "model.num_attention_heads=8", "model.num_query_groups=4", "model.mamba_head_dim=32",
            "model.mamba_state_dim=32", "model.mamba_num_groups=2", "model.vocab_size=4096",
            "data.mock_data=true", "data.tokenizer_type=null", f"data.seq_length={SEQ_LENGTH}",
            "training.train_iters=1", "training.global_batch_size=8", "optimizer.lr=1e-3",
            "backend=torch", *more, *(MOE if "E" in pattern else []),
        ],
        world_size=world_size, has_cuda=False,
    )  # fmt: skip


def storages(tensors: Iterator[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of what lies under the tensors, once each."""
    found = ((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors)
    return dict(found)


def state_bytes(config: RunConfig) -> tuple[int, int, int, int]:
    """On a rank: its stage, and the bytes of parameters, gradients and optimizer state."""
    from megatron.core import parallel_state

    from megatron_hybrid.training.optimizer import optimizer_parts

    with built(config) as (model, optimizer, _):
        parameters = storages(
            t for chunk in model for t in (*chunk.parameters(), *chunk.module.buffers())
        )
        gradients = storages(
            buffer.grad_data
            for chunk in model
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        )
        inner = [part.optimizer for part in optimizer_parts(optimizer)]
        states = storages(
            tensor
            for each in inner
            if each is not None
            for group in each.param_groups
            for parameter in group["params"]
            for tensor in (parameter, *each.state[parameter].values())
            if isinstance(tensor, torch.Tensor)
        )
        own = sum(size for place, size in states.items() if place not in parameters)
        stage = parallel_state.get_pipeline_model_parallel_rank()
    return stage, sum(parameters.values()), sum(gradients.values()), own


STATE_LAYOUTS = {
    "TP2 SP x PP2": [
        "M-*-|M-M-", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=2",
    ],
    "PP2 x VPP2 x DP2, uneven": ["M-|M*-|-|MM", "parallel.pipeline_model_parallel_size=2"],
    "CP2 x DP2, tied": [
        "M-M*-", "parallel.context_parallel_size=2",
        "model.untie_embeddings_and_output_weights=false",
    ],
    "EP2 x PP2, prediction": [
        "ME|*E", "parallel.expert_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2", "model.mtp_num_layers=2",
        "model.mtp_hybrid_override_pattern=*E",
    ],
    "EP2 x PP2 x DP, tied": [
        "ME|*E", "parallel.expert_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "model.untie_embeddings_and_output_weights=false",
        "model.moe_router_enable_expert_bias=true", "model.moe_router_score_function=sigmoid",
    ],
    "TP2 SP x PP2, unlike": [
        "M*-E|M*-E", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "parallel.pipeline_model_parallel_size=2",
        "model.layers={5-8: {mamba_num_heads: 8, mamba_num_groups: 4, num_attention_heads: 4,"
        " kv_channels: 64, ffn_hidden_size: 384, activation: swiglu, num_moe_experts: 4,"
        " moe_ffn_hidden_size: 64, moe_shared_expert_intermediate_size: null,"
        " moe_latent_size: 48}}",
    ],
    "EP4, fp32": ["M*E-", "parallel.expert_model_parallel_size=4", "precision.recipe=fp32"],
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_LAYOUTS)
def test_state(name: str) -> None:
    """Parameters, gradients and optimizer state of the fullest rank of each stage."""
    pattern, *more = STATE_LAYOUTS[name]
    config = run_config(pattern, *more, world_size=4)
    expected = rank_memory(config, 4, fused=False)
    most = [[0, 0, 0] for _ in expected]
    for stage, *sizes in run_distributed(state_bytes, 4, config):
        most[stage] = [max(pair) for pair in zip(most[stage], sizes, strict=True)]
    for memory, found in zip(expected, most, strict=True):
        planned = [memory.parameters, memory.gradients, memory.optimizer_state]
        assert planned == pytest.approx(found, rel=0.01), f"stage {memory.stage}"


@contextmanager
def every_pack(kept: list[torch.Tensor]) -> Iterator[None]:
    """Record what any hook on saved tensors keeps, those that operations set themselves included:
    the innermost hooks hide those around them.

    Attention is that of a processor with bf16 products, whichever this one is.
    """
    from megatron_hybrid.ops import bf16

    hooks, chooses = torch.autograd.graph.saved_tensors_hooks, bf16._choose_fp32
    original = hooks.__init__

    def recording(self: Any, pack: Any, unpack: Any) -> None:
        def record(saved: torch.Tensor) -> Any:
            packed = pack(saved)
            if isinstance(packed, torch.Tensor):
                kept.append(packed)
            return packed

        original(self, record, unpack)

    hooks.__init__, bf16._choose_fp32 = recording, lambda: False
    try:
        with hooks(lambda tensor: tensor, lambda tensor: tensor):
            yield
    finally:
        hooks.__init__, bf16._choose_fp32 = original, chooses


def kept_bytes(config: RunConfig) -> tuple[list[int], int]:
    """On a rank: bytes that each layer keeps for its backward pass, and what comes after them.

    Counted once each, without parameters.
    """
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    kept: list[torch.Tensor] = []
    found: list[int] = []
    torch.manual_seed(0)
    row = config.data.seq_length + config.model.num_meta_tokens
    length = row // config.parallel.context_parallel_size
    tokens = torch.randint(0, 4096, (config.training.micro_batch_size, length))
    positions = torch.arange(length).expand_as(tokens)
    with built(config) as (model, _, _):
        weights = storages(t for t in model[0].parameters())

        counted = set(weights)

        def size() -> int:
            sizes = storages(iter(kept))  # all stay, so that no address is another's later
            new = sizes.keys() - counted
            counted.update(new)
            return sum(sizes[place] for place in new)

        def count(*_: Any) -> None:
            found.append(size())

        stack = next(m for m in model[0].modules() if isinstance(m, HybridStack))
        ahead = [(tokens, tokens)] * (config.model.mtp_num_layers or 0)
        recompute = config.training.recompute_granularity == "full"
        for layer in [stack.final_norm] if recompute else stack.layers:
            if recompute:
                layer.register_forward_pre_hook(count)
            else:
                layer.register_forward_hook(count)
        with every_pack(kept):
            model[0](tokens, positions, None, labels=tokens, ahead=ahead)
        return found, size()


ATTENTION_ONLY = "**"
VARIANTS = {
    "one rank": ["M*-E"],
    "rope, no grouping": [
        "M*-E", "model.position_embedding_type=rope", "model.num_query_groups=8",
    ],
    "swiglu, fp32, two samples": [
        "M*-E", "model.activation=swiglu", "precision.recipe=fp32", "training.micro_batch_size=2",
    ],
    "float8 as emulated": [
        "M*-E", "precision.recipe=fp8_tensorwise", "precision.emulate=true",
        "precision.num_layers_at_start_in_bf16=0", "precision.num_layers_at_end_in_bf16=0",
    ],
    "unlike layers, rope of some": [
        "M*-EM**-E", "model.position_embedding_type=rope",
        "model.layers={5: {mamba_num_heads: 8, mamba_state_dim: 64, mamba_num_groups: 4},"
        " 4: {moe_latent_size: 96, moe_router_num_groups: 4, moe_router_group_topk: 1},"
        " 6: {num_attention_heads: 4, kv_channels: 16, window_size: [128, 0]},"
        " 7: {position_embedding_type: none, num_query_groups: 8}, 8: {activation: swiglu},"
        " 9: {num_moe_experts: 4, moe_router_topk: 3, moe_shared_expert_intermediate_size: 64}}",
    ],
    "TP2 SP, unlike layers": [
        "M-*EM-", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "model.layers={4-6: {mamba_head_dim: 64, mamba_num_heads: 4, ffn_hidden_size: 384,"
        " activation: swiglu, moe_ffn_hidden_size: 64}, '*': {kv_channels: 64},"
        " E: {moe_latent_size: 64}}",
    ],
    "CP2, unlike layers": [
        "M*M*", "parallel.context_parallel_size=2", "data.seq_length=1024",
        "model.layers={3-4: {mamba_num_heads: 4, mamba_num_groups: 4, num_query_groups: 1}}",
    ],
    "parallel heads": [
        "HH", "model.position_embedding_type=rope", "model.mamba_rms_norm=false",
        "model.ssm_multipliers=[1,2,1,1,1]", "model.attention_out_multiplier=0.5",
        "model.layers={2: {num_query_groups: 8, mamba_state_dim: 64}}",
    ],
    "TP2 SP, parallel heads with a factor": [
        "H-", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "model.activation=swiglu", "model.mlp_multipliers=[0.5,0.5]",
        "model.attention_in_multiplier=0.5",
    ],
    "parallel heads with Mamba-1 and a factor": [
        "HH", "model.mamba_version=1", "model.ssm_in_multiplier=0.5",
        "model.layers.2.position_embedding_type=rope",
    ],
    "shared heads": [
        "HHH", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.mamba_inner_layernorms=true", "model.layers={2-3: {position_embedding_type: rope},"
        " 3: {kv_channels: 64, window_size: [100, 0]}}",
    ],
    "reused keys and values": [
        "HH", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.layers.2.reuse_kv=true", "model.position_embedding_type=rope",
    ],
    "TP2 SP, shared heads, fp32": [
        "HH", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.mamba_inner_layernorms=true", "precision.recipe=fp32",
        "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
    ],
    "CP2, shared heads": [
        "HH", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.mamba_inner_layernorms=true", "model.position_embedding_type=rope",
        "parallel.context_parallel_size=2",
    ],
    "meta tokens": [
        "M*H", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.num_meta_tokens=64", "model.layers={1: {mamba_version: 2},"
        " 2: {window_size: [32, 0]}, 3: {window_size: [100, 0]}}",
    ],
    "shared heads, selective": [
        "HH", "model.mamba_version=1", "model.parallel_heads_join=mean",
        "model.position_embedding_type=rope", "training.recompute_granularity=selective",
    ],
    "gated delta nets": [
        "GG", "model.linear_key_head_dim=16", "model.linear_num_key_heads=8",
        "model.linear_value_head_dim=32",
        "model.layers={2: {linear_num_value_heads: 8, linear_value_head_dim: 16}}",
    ],
    "TP2 SP, gated delta nets, fp32": [
        "GG", "model.linear_key_head_dim=64", "precision.recipe=fp32",
        "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
    ],
    "CP2, gated delta nets": [
        "GG", "model.linear_key_head_dim=64", "parallel.context_parallel_size=2",
    ],
    "Mamba-1": ["MM", "model.mamba_version=1"],
    "TP2 SP, Mamba-1, fp32": [
        "MM", "model.layers={2: {mamba_version: 1, mamba_dt_rank: 5}}", "precision.recipe=fp32",
        "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
    ],
    "CP2, Mamba-1": ["MM", "model.mamba_version=1", "parallel.context_parallel_size=2"],
    "prediction": ["M*-E", "model.mtp_num_layers=2", "model.mtp_hybrid_override_pattern=*E"],
    "TP2 SP, prediction": [
        "M*-", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "model.mtp_num_layers=2", "model.mtp_hybrid_override_pattern=M",
    ],
    "hidden dropout": ["M*-E", "model.hidden_dropout=0.1"],
    "2048 tokens, wider": [
        "M*-E", "data.seq_length=2048", "model.hidden_size=512", "model.mamba_state_dim=128",
    ],
    "a window": [ATTENTION_ONLY, "model.window_size=[128,0]", "data.seq_length=2048"],
    "attention dropout in a window": [
        ATTENTION_ONLY, "model.attention_dropout=0.1", "model.window_size=[128,0]",
    ],
    "no mask": [ATTENTION_ONLY, "model.attn_mask_type=no_mask", "data.seq_length=2048"],
    "CP2, attention dropout without a mask": [
        ATTENTION_ONLY, "model.attn_mask_type=no_mask", "model.attention_dropout=0.1",
        "parallel.context_parallel_size=2",
    ],
    "rope, selective": [
        ATTENTION_ONLY, "model.position_embedding_type=rope", "model.window_size=[128,0]",
        "training.recompute_granularity=selective",
    ],
    # The engine computes "again" the MLP that an attention layer has not, and keeps its input
    # there, which is the next layer's too: in all it is the same.
    "in all, modules": [
        "M*-E", "training.recompute_granularity=selective",
        "training.recompute_modules=[core_attn,mlp,moe]",
    ],
    "shared experts": [
        "M-E", "training.recompute_granularity=selective", "model.hidden_dropout=0.1",
        "training.recompute_modules=[mlp,shared_experts]",
    ],
    "TP2 SP, modules": [
        "M-E", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "training.recompute_granularity=selective", "training.recompute_modules=[mlp,moe]",
    ],
    "TP2 SP, rope": [
        "M*-E", "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
        "model.position_embedding_type=rope",
    ],
    "CP2, 2048 tokens": [
        "M*-E", "parallel.context_parallel_size=2", "data.seq_length=2048",
        "model.num_query_groups=8",
    ],
    "CP4, more than Mamba-2 groups": [
        "M*-E", "parallel.context_parallel_size=4", "model.position_embedding_type=rope",
    ],
}  # fmt: skip


def fullest(config: RunConfig, ranks: int) -> tuple[list[int], int]:
    """`kept_bytes` of the rank that has most, layer by layer."""
    layers, rest = zip(*run_distributed(kept_bytes, ranks, config), strict=True)
    return [max(sizes) for sizes in zip(*layers, strict=True)], max(rest)


@pytest.mark.parametrize("name", VARIANTS)
def test_activations(name: str) -> None:
    """Each kind of layer, and what is kept for the loss, against the tensors that are kept."""
    pattern, *more = VARIANTS[name]
    ranks = {"P2": 2, "P4": 4}.get(name[1:3], 1)
    config = run_config(pattern, *more, world_size=ranks)
    layout = layout_of(config, ranks)
    number = 4 if config.precision.recipe == "fp32" else 2
    planned = [
        layer_activations(
            sort.model, sort.kind, layout, number_bytes=number, fused=False, fp8=False,
            recompute=Features.of(config).recompute,
        )
        for sort in sort_of_each(config.model)
    ]  # fmt: skip
    # Before the first layer comes the embedding.
    planned[0] += dropout_mask(config.model, layout, number_bytes=number, fused=False)
    layers, rest = fullest(config, ranks)
    if name.startswith("in all"):
        planned, layers = [sum(planned)], [sum(layers)]
    assert planned == pytest.approx(layers, rel=0.02)
    loss = output_activations(config.model, layout, number_bytes=number, fused=False)
    loss += prediction_activations(config.model, layout, number_bytes=number, fused=False)[0]
    assert loss == pytest.approx(rest, rel=0.02)


@pytest.mark.parametrize("kind", ["M", "*", "-", "E"])
def test_recomputed_activations(kind: str) -> None:
    """Layers that are computed again keep the input of each group, of one layer or of two; the
    first layers only, with the block method.
    """
    variants = {"uniform 1": ("uniform", 1), "uniform 2": ("uniform", 2), "block 3": ("block", 3)}
    for name, (method, layers) in variants.items():
        config = run_config(
            kind * 4, "training.recompute_granularity=full",
            f"training.recompute_method={method}", f"training.recompute_num_layers={layers}",
        )  # fmt: skip
        layout = layout_of(config, 1)
        whole = layer_activations(
            config.model, kind, layout, number_bytes=2, fused=False, fp8=False
        )
        again = layer_input(config.model, layout, number_bytes=2)
        planned = {"uniform 1": 4 * again, "uniform 2": 2 * again, "block 3": 3 * again + whole}
        [found] = run_distributed(kept_bytes, 1, config)[0][0]
        assert planned[name] == pytest.approx(found, rel=0.02), name


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("M*-E", []),
        ("M*-E", ["model.activation=swiglu"]),
        ("M*-", ["model.add_bias_linear=true"]),
        ("H-", ["model.mamba_rms_norm=false"]),
    ],
)
def test_one_rank_has_the_models_parameters(pattern: str, more: list[str]) -> None:
    """On one rank the only stage has what `model.counts` counts."""
    config = run_config(pattern, *more)
    found = stage_parameters(config.model, layout_of(config, 1), 0)
    assert found.total == count_parameters(config.model).total


def test_transfers() -> None:
    """Each kind of parallelism adds what it has on its way, by hand: bf16, 512 tokens of 256."""
    hidden = 2 * SEQ_LENGTH * 256
    expected = {
        "M*-E": 0,
        "TP": hidden,  # gathered; each rank's own part is half
        "PP": 2 * hidden,  # received, and its gradient
        "EP": 2 * hidden,  # two copies of each token
        "CP": 2 * 2 * 2 * (SEQ_LENGTH // 2) * 4 * 32,  # keys and values of half the tokens, twice
    }
    layouts = {
        "M*-E": [],
        "TP": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
        "PP": ["parallel.pipeline_model_parallel_size=2"],
        "EP": ["parallel.expert_model_parallel_size=2"],
        "CP": ["parallel.context_parallel_size=2"],
    }
    found = {
        name: rank_memory(run_config("M*-E", *more, world_size=2), 2, fused=False)[0].communication
        for name, more in layouts.items()
    }
    assert found == expected
