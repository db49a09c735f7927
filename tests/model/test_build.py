"""The model as it is built has as many parameters as the formula says, kind by kind."""

from collections import Counter

import pytest

from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.generation import ONE_RANK
from megatron_hybrid.model.counts import count_parameters
from megatron_hybrid.testing import run_distributed

PUBLISHED = {
    "nemotron_h_8b": 8_100_852_736,
    "nemotron_h_4b": 4_489_223_040,
    "nemotron_h_56b": 56_324_350_464,
    "nemotron_nano_12b_v2": 12_310_001_152,
    "nemotron_nano_9b_v2": 8_888_227_328,
    "nemotron_3_nano": 31_577_937_344,
    "falcon_h1_0_5b": 521_411_104,
    "falcon_h1_1_5b": 1_554_863_488,
    "hymba_125m": 129_944_064,
    "hymba_350m": 353_701_888,
    "hymba_1_5b": 1_522_797_824,
}
VOCABULARY = "model.vocab_size=4096"


def parameters_built(args: list[str]) -> dict[str, int]:
    """On a rank: parameters of the model, made on the meta device, by layer symbol."""
    import torch

    from megatron_hybrid.model.build import build_model
    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform import initialize
    from megatron_hybrid.training.distributed import model_parallel_groups

    config = load_config(args, which=rules.NO_FILES)
    meta = torch.device("meta")
    counts: Counter[str] = Counter()
    with model_parallel_groups(config, initialize()), meta:
        model = build_model(config, transformer_config(config, "torch", meta), "torch")
        symbols = parse_pattern(config.model.hybrid_layer_pattern).layers
        for symbol, layer in zip(symbols, model.decoder.layers, strict=True):
            counts[symbol] += sum(p.numel() for p in layer.parameters())
        counts["all"] = sum(p.numel() for p in model.parameters())
        assert all(p.is_meta for p in model.parameters())
    return counts


@pytest.mark.parametrize("name", presets())
def test_built_equals_formula(name: str) -> None:
    """Every preset, built without memory for it; published totals are met exactly."""
    args = [name, *ONE_RANK, *([VOCABULARY] if name == "tiny" else [])]
    built = run_distributed(parameters_built, 1, args)[0]
    expected = count_parameters(load_config(args, which=rules.NO_FILES).model)
    for symbol in expected.layers:
        sorts = [sort for sort in expected.sorts if sort.kind == symbol]
        assert built[symbol] == sum(sort.each * len(sort.numbers) for sort in sorts)
    assert built["all"] == expected.total == PUBLISHED.get(name, expected.total)


@pytest.mark.parametrize(
    "change",
    ["model.mamba_version=1", "model.mamba_version=1; model.mamba_inner_layernorms=true",
     "model.hybrid_layer_pattern=H-HME; model.parallel_heads_join=mean; model.mamba_version=1;"
     " model.mamba_inner_layernorms=true; model.layers.1={num_query_groups: 1, kv_channels: 24}",
     "model.hybrid_layer_pattern=H-HME; model.parallel_heads_join=mean; model.mamba_version=1;"
     " model.layers.3.reuse_kv=true",
     "model.hybrid_layer_pattern=H-HME; model.layers.1.mamba_version=1",
     "model.num_meta_tokens=5; model.hybrid_layer_pattern=M*-; model.num_moe_experts=null;"
     " model.moe_ffn_hidden_size=null; model.moe_shared_expert_intermediate_size=null;"
     " model.moe_aux_loss_coeff=0; model.moe_router_score_function=softmax",
 "model.activation=swiglu",
     "model.untie_embeddings_and_output_weights=false",
     "model.moe_shared_expert_intermediate_size=null", "model.mamba_num_groups=1",
     "model.moe_router_enable_expert_bias=true",
     "model.hybrid_layer_pattern=H-HME; model.mamba_rms_norm=false; model.add_bias_linear=true"
     "; model.moe_shared_expert_intermediate_size=null"
     "; model.layers={3: {num_attention_heads: 8, mamba_state_dim: 16}}",
     "model.mtp_num_layers=2; model.mtp_hybrid_override_pattern=M*-E",
     "model.moe_latent_size=24; model.add_bias_linear=true"
     "; model.moe_shared_expert_intermediate_size=null",
     "model.hybrid_layer_pattern=GG-E; model.linear_key_head_dim=16; model.add_bias_linear=true"
     "; model.moe_shared_expert_intermediate_size=null"
     "; model.layers={2: {linear_num_value_heads: 24, linear_value_head_dim: 8}}",
     "model.layers={3: {mamba_num_heads: 4, mamba_state_dim: 16, mamba_num_groups: 4},"
     " 1: {mamba_version: 1, mamba_intermediate_size: 72, mamba_dt_rank: 3}, 5-8:"
     " {activation: swiglu, ffn_hidden_size: 96, num_moe_experts: 3, moe_ffn_hidden_size: 32,"
     " moe_shared_expert_intermediate_size: null, mamba_head_dim: 16},"
     " '*': {num_attention_heads: 6, num_query_groups: 3, kv_channels: 16}}"],
)  # fmt: skip
def test_variants(change: str) -> None:
    """Mamba-1, gated MLPs, tied embeddings, no shared expert, unlike layers: it follows."""
    more = ["model.moe_router_score_function=sigmoid"] if "expert_bias" in change else []
    args = ["tiny", *ONE_RANK, VOCABULARY, *change.split("; "), *more]
    built = run_distributed(parameters_built, 1, args)[0]
    counts = count_parameters(load_config(args, which=rules.NO_FILES).model)
    assert built["all"] == counts.total
    for kind in counts.layers:
        of_kind = (sort for sort in counts.sorts if sort.kind == kind)
        assert built[kind] == sum(len(sort.numbers) * sort.each for sort in of_kind)
