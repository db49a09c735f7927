"""Small models of every kind of layer, with weights drawn so that each one matters."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.generation import Generator, Limits

VOCAB_SIZE = 75  # of 96 rows
EOD = VOCAB_SIZE - 1  # the null tokenizer's last
SMALL = shlex.split("""tiny --mock-data --tokenizer-type null training.train_iters=1
    model.vocab_size=75 model.make_vocab_size_divisible_by=32 model.hidden_size=48
    model.ffn_hidden_size=96 model.num_attention_heads=4 model.num_query_groups=2
    model.mamba_head_dim=12 model.mamba_state_dim=16 model.mamba_num_groups=2""")
NO_MOE = shlex.split("""model.num_moe_experts=null model.moe_ffn_hidden_size=null
    model.moe_shared_expert_intermediate_size=null model.moe_router_score_function=softmax
    model.moe_router_topk=2 model.moe_aux_loss_coeff=0""")
MOE = ["model.moe_ffn_hidden_size=24", "model.moe_shared_expert_intermediate_size=36"]
# Every layer kind, and what changes how one is computed.
MODELS = {
    "all kinds": ["model.hybrid_layer_pattern=M-*E", "model.position_embedding_type=rope", *MOE],
    "window": ["model.hybrid_layer_pattern=*M*", "model.window_size=[11, 0]",
               "model.position_embedding_type=rope", "model.rotary_percent=0.5", *NO_MOE],
    "two layers": ["model.hybrid_layer_pattern=M*", *NO_MOE],
    "mamba alone, tied": ["model.hybrid_layer_pattern=MMM",
                          "model.layers={2-3: {mamba_version: 1, mamba_dt_rank: 2}}",
                          "model.untie_embeddings_and_output_weights=false", *NO_MOE],
    "gated, biases": ["model.hybrid_layer_pattern=-*-", "model.activation=swiglu",
                      "model.add_bias_linear=true", *NO_MOE],
    "expert bias, packed": ["model.hybrid_layer_pattern=EM*E", "data.packed_documents=true",
                            "model.moe_router_enable_expert_bias=true", "model.activation=gelu",
                            "model.mtp_num_layers=1", "model.mtp_hybrid_override_pattern=*E",
                            "model.moe_router_topk_scaling_factor=1.5", *MOE],
    "unlike layers": ["model.hybrid_layer_pattern=*M-*E*ME", "model.position_embedding_type=rope",
                      "model.layers={4: {num_attention_heads: 3, num_query_groups: 3,"
                      " kv_channels: 8, window_size: [11, 0]}, 6: {window_size: [25, 0],"
                      " position_embedding_type: none}, 7: {mamba_num_heads: 4,"
                      " mamba_state_dim: 8}, 3: {activation: swiglu}, 8: {activation: gelu,"
                      " moe_ffn_hidden_size: 36, num_moe_experts: 3, moe_router_topk: 1,"
                      " moe_shared_expert_intermediate_size: null},"
                      " 5: {moe_latent_size: 20, moe_router_num_groups: 4, moe_router_topk: 3,"
                      " moe_router_group_topk: 3}}", *MOE],
    "parallel heads": ["model.hybrid_layer_pattern=H-*MH", "model.activation=swiglu",
                       "model.position_embedding_type=rope", "model.mamba_rms_norm=false",
                       "model.key_multiplier=0.7", "model.ssm_multipliers=[0.4,0.6,1.5,0.8,1.2]",
                       "model.ssm_in_multiplier=1.25", "model.ssm_out_multiplier=0.6",
                       "model.attention_in_multiplier=0.9", "model.attention_out_multiplier=0.8",
                       "model.mlp_multipliers=[0.9,0.6]", "model.embedding_multiplier=3",
                       "model.lm_head_multiplier=0.5", "model.add_bias_linear=true",
                       "model.layers={5: {num_attention_heads: 3, num_query_groups: 3,"
                       " kv_channels: 8, window_size: [11, 0], mamba_num_heads: 4,"
                       " mamba_state_dim: 8}, 1: {mamba_version: 1}}", *NO_MOE],
    "shared heads": ["model.hybrid_layer_pattern=HM-H", "model.position_embedding_type=rope",
                     "model.parallel_heads_join=mean", "model.mamba_version=1",
                     "model.mamba_inner_layernorms=true", "model.activation=swiglu",
                     "model.layers={4: {window_size: [11, 0]}}", *NO_MOE],
    "reused keys": ["model.hybrid_layer_pattern=H-HMHH", "model.position_embedding_type=rope",
                    "model.parallel_heads_join=mean", "model.mamba_version=1",
                    "model.window_size=[9, 0]",
                    "model.layers={3: {reuse_kv: true}, 6: {reuse_kv: true, window_size: null}}",
                    *NO_MOE],
    "meta tokens": ["model.hybrid_layer_pattern=HM-*", "model.position_embedding_type=rope",
                    "model.parallel_heads_join=mean", "model.mamba_version=1",
                    "model.num_meta_tokens=6", "model.embedding_multiplier=2",
                    "model.layers={1: {window_size: [9, 0]}, 2: {mamba_version: 2},"
                    " 4: {window_size: [3, 0]}}", *NO_MOE],
    "gated delta nets": ["model.hybrid_layer_pattern=GMG", "model.linear_key_head_dim=12",
                         "model.linear_num_key_heads=2", "model.linear_value_head_dim=8",
                         "model.layers={3: {linear_num_value_heads: 2}}", *NO_MOE],
    "softmax first": ["model.hybrid_layer_pattern=ME", "model.moe_router_score_function=softmax",
                      "model.moe_router_pre_softmax=true", "model.moe_router_topk=1",
                      "model.moe_ffn_hidden_size=24",
                      "model.moe_shared_expert_intermediate_size=null"],
}  # fmt: skip


def small_config(name: str, *words: str) -> RunConfig:
    """One of `MODELS`, with changes."""
    return load_config([*SMALL, *MODELS[name], *words], which=rules.NO_FILES, has_cuda=False)


def draw_weights(chunks: Sequence[Any], seed: int = 0) -> None:
    """Every parameter anew, so that logits spread and no norm or bias is what it began as."""
    draws = torch.Generator().manual_seed(seed)
    ranges = {"norm": (0.5, 1.5), "dt_bias": (-6.9, -2.25), "A_log": (0.0, 2.77), ".D": (-1.0, 1.0)}
    with torch.no_grad():
        for chunk in chunks:
            for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
                if "tokens_per_expert" in name:
                    continue
                if "mtp." in name:  # which no text depends on
                    tensor.fill_(torch.nan)
                    continue
                low, high = next((r for part, r in ranges.items() if part in name), (-0.4, 0.4))
                tensor.uniform_(low, high, generator=draws)


@contextmanager
def of_config(config: RunConfig, limits: Limits | None = None) -> Iterator[Generator]:
    """On a rank: a generator of a config's model, as it was initialised, in its layout's groups."""
    from megatron_hybrid.data.tokenizer import NullTokenizer
    from megatron_hybrid.model.build import build_model_chunks
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    platform = initialize()
    with model_parallel_groups(config, platform):
        chunks = build_model_chunks(
            config, transformer_config(config, "torch", platform.device), "torch"
        )
        for chunk in chunks:
            chunk.eval()
        yield Generator.of_model(config, chunks, NullTokenizer(VOCAB_SIZE), limits=limits)


@contextmanager
def built(config: RunConfig, limits: Limits | None = None) -> Iterator[Generator]:
    """The same with weights by `draw_weights`."""
    with of_config(config, limits) as generator:
        draw_weights(generator.chunks)
        yield generator
