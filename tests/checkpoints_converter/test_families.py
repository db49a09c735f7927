"""mamba2, bamba, granitemoehybrid: bytes, logits and gradients of transformers; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.registry import family, family_for
from megatron_hybrid.config import ModelConfig, build_config
from tests.checkpoints_converter.cases import (
    Case,
    assert_file_comes_back,
    assert_same_gradients,
    assert_same_logits,
    run_cases,
)
from tests.checkpoints_converter.peer_models import CHUNK_SIZE, VOCAB_SIZE, randomized

SIZES = {
    "hidden_size": 48, "vocab_size": VOCAB_SIZE, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
# Of the families whose layer is a mixer and an MLP.
BLOCKS = SIZES | {
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 5,
    "mamba_n_groups": 2, "mamba_expand": 2, "mamba_chunk_size": CHUNK_SIZE,
    "intermediate_size": 56,
}  # fmt: skip


def mamba2(**fields: Any) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "num_hidden_layers": 3, "num_heads": 8, "head_dim": 12, "state_size": 5, "n_groups": 2,
        "chunk_size": CHUNK_SIZE,
    }  # fmt: skip
    return randomized(Mamba2ForCausalLM(Mamba2Config(**SIZES | sizes | fields)))


def bamba(**fields: Any) -> Any:
    from transformers import BambaConfig, BambaForCausalLM

    return randomized(
        BambaForCausalLM(BambaConfig(**BLOCKS | {"attn_layer_indices": [1]} | fields))
    )


def granite(**fields: Any) -> Any:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    own = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "attention_multiplier": 12**-0.5,
        "shared_intermediate_size": 28,
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "router_aux_loss_coef": 0.0,  # ours would add its gradient, transformers does not
    }
    return randomized(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**BLOCKS | own | fields)))


# Of released models: factors on everything.
FACTORS = {
    "key_multiplier": 0.39, "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.94,
    "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.24, "embedding_multiplier": 5.7,
    "lm_head_multiplier": 0.3, "mlp_multipliers": [0.88, 0.59],
    "ssm_multipliers": [0.35, 0.25, 0.5, 1.4, 0.7],
}  # fmt: skip


def falcon(**fields: Any) -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    own = {"num_hidden_layers": 2, "mamba_d_ssm": 96, "mamba_rms_norm": False}
    sizes = {name: value for name, value in BLOCKS.items() if name != "mamba_expand"}
    return randomized(FalconH1ForCausalLM(FalconH1Config(**sizes | own | fields)))


def with_norm(**fields: Any) -> Any:
    return falcon(mamba_rms_norm=True, mamba_norm_before_gate=False, **fields)


MODELS: dict[str, Callable[[], Any]] = {
    "mamba2": mamba2,
    "mamba2, one group": lambda: mamba2(n_groups=1, expand=3, num_heads=24, head_dim=6),
    "mamba2, tied": lambda: mamba2(tie_word_embeddings=True, num_hidden_layers=2),
    "bamba": bamba,
    "bamba, multi-query, tied": lambda: bamba(num_key_value_heads=1, tie_word_embeddings=True),
    "bamba, head_dim": lambda: bamba(
        head_dim=20, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "granite, dense": granite,
    "granite, experts": lambda: granite(num_local_experts=6, num_experts_per_tok=3),
    "granite, no positions": lambda: granite(
        num_local_experts=4, position_embedding_type=None, tie_word_embeddings=True
    ),
    "falcon": falcon,
    "falcon, factors": lambda: falcon(**FACTORS),
    "falcon, tied": lambda: falcon(tie_word_embeddings=True, **FACTORS),
    "falcon, factors of the ends": lambda: falcon(embedding_multiplier=3.0, lm_head_multiplier=0.1),
    "falcon, factors of attention": lambda: falcon(
        key_multiplier=0.5, attention_in_multiplier=0.7, attention_out_multiplier=1.3
    ),
    "falcon, factors of Mamba-2": lambda: falcon(
        ssm_in_multiplier=1.25, ssm_out_multiplier=0.24, ssm_multipliers=[0.5, 0.25, 2.0, 1.5, 0.7]
    ),
    "falcon, factors of MLPs": lambda: falcon(mlp_multipliers=[0.88, 0.59]),
    "falcon, norm after the gate": with_norm,
    "falcon, norm of one group": lambda: with_norm(mamba_n_groups=1, **FACTORS),
    "falcon, norm of four groups": lambda: with_norm(mamba_n_groups=4, num_key_value_heads=4),
    "falcon, head sizes": lambda: falcon(
        head_dim=20,
        mamba_n_heads=6,
        mamba_d_head=10,
        mamba_d_ssm=60,
        mamba_n_groups=3,
        mamba_d_state=7,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        **FACTORS,
    ),
    "falcon, multi-query": lambda: falcon(num_key_value_heads=1, mamba_n_groups=8, **FACTORS),
    "falcon, epsilon": lambda: falcon(rms_norm_eps=1e-3),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every model, converted and run."""
    models = {name: make() for name, make in MODELS.items()}
    return run_cases(tmp_path_factory.mktemp("families"), models)


@pytest.mark.parametrize("name", MODELS)
def test_file_comes_back_byte_for_byte(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """Imported and exported again, the file is the one that transformers wrote."""
    assert_file_comes_back(cases[name], tmp_path / "hf")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs(name: str, cases: dict[str, Case]) -> None:
    """Our trainer's model computes the logits of transformers, to 1e-5 of their deviation."""
    assert_same_logits(cases[name])


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_theirs(name: str, cases: dict[str, Case]) -> None:
    """Each parameter's gradient in training is that of transformers under the map, to 1e-5."""
    assert_same_gradients(cases[name])


INFINITY = {"__float__": "Infinity"}
# model_type: (fields of a config.json that can be held, {field: (a value that cannot, the text)})
REFUSED: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, str]]]] = {
    "mamba2": (
        {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "time_step_limit": [0.0, INFINITY]},
        {
            "use_bias": (True, "use_bias=True must be False"),
            "use_conv_bias": (False, "use_conv_bias=False must be True"),
            "conv_kernel": (3, "conv_kernel=3 must be 4"),
            "hidden_act": ("gelu", "hidden_act='gelu' must be 'silu'"),
            "layer_norm_epsilon": (1e-6, "layer_norm_epsilon=1e-06 must be 1e-05"),
            "time_step_limit": ([0.001, 0.1], "time_step_limit=[0.001, 0.1] must be [0, inf]"),
            "expand": (3, "num_heads=8 of head_dim=16 must make expand * hidden_size = 192"),
            "state_size": (0, "state_size=0 must be a whole number"),
        },
    ),
    "bamba": (
        {"num_hidden_layers": 2, "attn_layer_indices": [1]},
        {
            "mlp_bias": (True, "mlp_bias=True must be False"),
            "attention_bias": (True, "attention_bias=True must be False"),
            "mamba_proj_bias": (True, "mamba_proj_bias=True must be False"),
            "mamba_conv_bias": (False, "mamba_conv_bias=False must be True"),
            "rms_norm_eps": (1e-6, "rms_norm_eps=1e-06 must be 1e-05"),
            "hidden_act": ("relu", "hidden_act='relu' must be 'silu'"),
            "num_attention_heads": (7, "num_attention_heads=7 must divide hidden_size=4096"),
            "rope_parameters": ({"rope_type": "yarn"}, "rope_type='yarn' must be 'default'"),
            "rope_theta": (0.5, "rope_theta=0.5 must be a whole number"),
        },
    ),
    "granitemoehybrid": (
        {
            "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "rms_norm_eps": 1e-5,
            "attention_multiplier": 128**-0.5,
        },
        {
            "embedding_multiplier": (12.0, "embedding_multiplier=12.0 must be 1.0"),
            "residual_multiplier": (0.22, "residual_multiplier=0.22 must be 1.0"),
            "logits_scaling": (8.0, "logits_scaling=8.0 must be 1.0"),
            "attention_multiplier": (0.0078125, "attention_multiplier=0.0078125 must be 0.08838"),
            "per_layer_config": ({1: {"shared_intermediate_size": 8}}, "per_layer_config="),
            "position_embedding_type": ("alibi", "position_embedding_type='alibi' must be None"),
            "layer_types": (["mamba", "window"], "layer_types has window"),
            "num_hidden_layers": (3, "num_hidden_layers=3 must be 2"),
            "rope_theta": (True, "rope_theta=True must be a whole number"),
        },
    ),
    "falcon_h1": (
        {"num_hidden_layers": 2, "mamba_d_head": 8},
        {
            "mamba_rms_norm": (True, "mamba_norm_before_gate=None must be False with mamba_rms_n"),
            "mamba_d_ssm": (1000, "mamba_n_heads=128 of mamba_d_head=8 must make mamba_d_ssm = 10"),
            "projectors_bias": (True, "projectors_bias=True must be False"),
            "attention_bias": (True, "attention_bias=True must be False"),
            "attn_layer_indices": ([0], "attn_layer_indices=[0] must be None"),
            "ssm_multipliers": ([1.0], "ssm_multipliers=[1.0] must be 5 numbers above 0"),
            "mlp_multipliers": ([1.0, 0.0], "mlp_multipliers=[1.0, 0.0] must be a number above 0"),
            "key_multiplier": (0.0, "key_multiplier=0.0 must be a number above 0"),
            "lm_head_multiplier": (None, "lm_head_multiplier=None must be a number above 0"),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_held_is_named(model_type: str) -> None:
    """Each field that our layers have no counterpart for, with its value; the others are fine."""
    right, wrong = REFUSED[model_type]
    fields, _ = family(model_type).read(right)
    assert fields.problems == []
    for name, (value, expected) in wrong.items():
        fields, _ = family(model_type).read(right | {name: value})
        assert [problem for problem in fields.problems if problem.startswith(expected)], (
            name, fields.problems,
        )  # fmt: skip


BASE = {
    "hybrid_layer_pattern": "M-*-", "hidden_size": 64, "activation": "swiglu",
    "num_attention_heads": 4, "mamba_head_dim": 16, "mamba_num_groups": 2, "vocab_size": 64,
    "position_embedding_type": "rope",
}  # fmt: skip
HEADS = BASE | {"hybrid_layer_pattern": "H-H-", "key_multiplier": 0.5}
EXPERTS = BASE | {
    "hybrid_layer_pattern": "ME*E", "num_moe_experts": 4, "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
# (family, model section that it can hold, what is changed, the text)
NOT_EXPORTED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("mamba2", BASE | {"hybrid_layer_pattern": "MM"}, {"hybrid_layer_pattern": "M-"}, "'M' only"),
    ("mamba2", BASE | {"hybrid_layer_pattern": "MM"}, {"mamba_num_heads": 10}, "160 channels"),
    ("bamba", BASE, {"hybrid_layer_pattern": "MM-"}, "model.hybrid_layer_pattern='MM-'"),
    ("bamba", BASE, {"position_embedding_type": "none"}, "model.position_embedding_type=none"),
    ("bamba", BASE, {"activation": "squared_relu"}, "model.activation=squared_relu"),
    ("bamba", BASE, {"add_bias_linear": True}, "model.add_bias_linear=true"),
    ("bamba", BASE, {"window_size": (8, 0)}, "model.window_size=[8, 0]"),
    ("bamba", BASE, {"attn_mask_type": "no_mask"}, "model.attn_mask_type=no_mask"),
    ("bamba", BASE, {"hybrid_layer_pattern": "M-H-"}, "'M-H-' must have no 'H'"),
    ("bamba", BASE, {"hybrid_layer_pattern": "M-G-", "linear_key_head_dim": 64}, "no 'G'"),
    ("bamba", BASE, {"mamba_rms_norm": False}, "model.mamba_rms_norm=false must be true"),
    ("granitemoehybrid", EXPERTS, {"key_multiplier": 0.5}, "model.key_multiplier=0.5"),
    ("bamba", BASE, {"ssm_multipliers": (1, 2, 1, 1, 1)}, "model.ssm_multipliers=[1.0, 2.0, 1.0"),
    ("bamba", BASE, {"embedding_multiplier": 2.0}, "model.embedding_multiplier=2.0"),
    (
        "nemotron_h", BASE | {"position_embedding_type": "none", "activation": "squared_relu"},
        {"attn_mask_type": "no_mask"}, "model.attn_mask_type='no_mask'",
    ),
    ("bamba", BASE, {"layers": {"2": {"ffn_hidden_size": 32}}}, "layers.2.ffn_hidden_size=32"),
    ("falcon_h1", HEADS, {"hybrid_layer_pattern": "H-M-"}, "must be of 'H-' only"),
    ("falcon_h1", HEADS, {"position_embedding_type": "none"}, "must be rope"),
    ("falcon_h1", HEADS, {"rotary_percent": 0.5}, "model.rotary_percent=0.5 must be 1.0"),
    ("falcon_h1", HEADS, {"layernorm_epsilon": 1e-6}, "model.layernorm_epsilon=1e-06"),
    ("bamba", BASE, {"layernorm_epsilon": 1e-6}, "model.layernorm_epsilon=1e-06"),
    ("granitemoehybrid", EXPERTS, {"rotary_percent": 0.5}, "model.rotary_percent=0.5"),
    ("granitemoehybrid", EXPERTS, {"hybrid_layer_pattern": "ME*-"}, "one kind of MLP"),
    ("granitemoehybrid", EXPERTS, {"moe_router_score_function": "sigmoid"}, "takes a softmax"),
    ("granitemoehybrid", EXPERTS, {"moe_router_pre_softmax": True}, "moe_router_pre_softmax=True"),
    ("granitemoehybrid", EXPERTS, {"moe_router_topk_scaling_factor": 2.0}, "not scaled"),
    ("granitemoehybrid", EXPERTS, {"moe_latent_size": 8}, "moe_latent_size=8 must be None"),
    (
        "nemotron_h",
        EXPERTS
        | {"moe_router_score_function": "sigmoid", "position_embedding_type": "none"}
        | {"activation": "squared_relu"},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "by their 1 best",
    ),
    (
        "granitemoehybrid", EXPERTS, {"moe_shared_expert_intermediate_size": None},
        "moe_shared_expert_intermediate_size=null",
    ),
]  # fmt: skip


def model_config(values: dict[str, Any]) -> ModelConfig:
    run = {"model": values, "data": {"mock_data": True, "tokenizer_type": "null"},
           "training": {"train_iters": 1}, "optimizer": {"lr": 1e-3}}  # fmt: skip
    return build_config(run, which=()).model


@pytest.mark.parametrize(("name", "held", "change", "expected"), NOT_EXPORTED)
def test_what_cannot_be_exported_is_named(
    name: str, held: dict[str, Any], change: dict[str, Any], expected: str
) -> None:
    """A model of ours that the family cannot hold exactly is refused with the field; others not."""
    assert family_for(model_config(held), name).model_type == name
    with pytest.raises(ConversionError) as error:
        family_for(model_config(held | change), name)
    assert expected in str(error.value)


def test_transformers_builds_no_layers_of_unlike_sizes() -> None:
    """Why an export of them is refused: the release in which this passes can have them."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=8, hidden_size=16, layers_block_type=["mlp", "mlp"], intermediate_size=16,
        per_layer_config={1: {"intermediate_size": 8}},
    )  # fmt: skip
    with torch.device("meta"), pytest.raises(RuntimeError, match="intermediate_size"):
        NemotronHForCausalLM(config)
