"""Megatron-LM's arguments in a checkpoint: what they leave open is not made up."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.checkpoint.megatron_arguments import differences, function_values, run_values
from megatron_hybrid.checkpoint.saved_config import FUNCTION_FIELDS, other_functions
from megatron_hybrid.checkpoint.source_model import source_config
from megatron_hybrid.config import load_config, rules
from megatron_hybrid.config.layers import MULTIPLIED

ARGUMENTS = {"hybrid_layer_pattern": "M", "hidden_size": 32, "seq_length": 64}


def test_the_sequence_length_is_said_or_missing() -> None:
    """By either name; a model exported from it says so for how many tokens it is made."""
    assert run_values(ARGUMENTS)["data"] == {"seq_length": 64}
    older = ARGUMENTS | {"seq_length": None, "encoder_seq_length": 32}
    assert run_values(older)["data"] == {"seq_length": 32}
    with pytest.raises(CheckpointError, match="neither seq_length nor encoder_seq_length is set"):
        run_values(ARGUMENTS | {"seq_length": None})


def test_what_arguments_say_of_another_model() -> None:
    """Each that is there and differs is named; those that are missing say nothing."""
    model = load_config(
        ["tiny", "data.tokenizer_type=null", "model.vocab_size=4096"], which=rules.NO_FILES
    ).model
    same = {"hidden_size": model.hidden_size, "hybrid_layer_pattern": model.hybrid_layer_pattern}
    assert differences(same, model) == []
    assert differences({}, model) == []
    assert differences({"swiglu": True, "mamba_num_heads": 7, "qk_layernorm": True}, model) == [
        f"model.mamba_num_heads={model.mamba_num_heads}, in the checkpoint 7",
        "model.activation='squared_relu', in the checkpoint 'swiglu'",
        "qk_layernorm=True has no counterpart here; it must be False",
    ]
    attention = model.model_copy(update={"hybrid_layer_pattern": "**"})
    unused = {"mamba_num_heads": 7, "ffn_hidden_size": 3, "swiglu": True, "moe_ffn_hidden_size": 1}
    assert differences(unused, attention) == []
    other = differences({"hybrid_override_pattern": "M-M-"}, model)
    assert other == [f"model.hybrid_layer_pattern={model.hybrid_layer_pattern!r}, in the "
                     "checkpoint 'M-M-'"]  # fmt: skip


@pytest.mark.parametrize("common", [{"progress": {}}, {"upcycling": {}}])
def test_a_model_that_is_named_is_none_of_ours(common: dict[str, Any]) -> None:
    """A checkpoint of this program that lost its config is not read as whatever is typed."""
    reader = cast(Any, SimpleNamespace(folder=Path("here"), config_file=None, common=common))
    for source in ("tiny", None):
        with pytest.raises(CheckpointError, match=r"here/run_config\.yaml is missing, which"):
            source_config(reader, source)


def test_what_megatron_lm_says_of_the_function() -> None:
    """Every field that our models have and tensors do not show; of layers that there are."""
    said = {
        "position_embedding_type": "rope", "rotary_base": 500000, "rotary_percent": 0.5,
        "normalization": "RMSNorm", "norm_epsilon": 1e-6, "moe_router_topk": 6,
        "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 4, "moe_router_group_topk": 3,
    }  # fmt: skip
    expected = {"layernorm_epsilon" if k == "norm_epsilon" else k: v for k, v in said.items()}
    # Which it has no arguments for.
    expected |= {
        "attn_mask_type": "causal", "key_multiplier": 1.0, "ssm_multipliers": (1.0,) * 5,
        "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0,
    }  # fmt: skip
    found = function_values(said, "M*E")
    assert found == expected
    heads = {name for name, kind in MULTIPLIED.items() if kind in ("H", "-")}
    assert found.keys() == set(FUNCTION_FIELDS) - heads - {"window_size"}  # which is refused
    # Which it reads only together.
    assert "moe_router_num_groups" not in function_values({"moe_router_num_groups": 1}, "E")
    dense = function_values(said, "M-")
    assert not any(name.startswith("moe_") for name in dense)
    model = load_config(
        ["tiny", "data.tokenizer_type=null", "model.vocab_size=4096"], which=rules.NO_FILES
    ).model
    assert [text.partition("=")[0] for text in other_functions(model, found)][:3] == [
        "model.position_embedding_type", "model.rotary_base", "model.rotary_percent",
    ]  # fmt: skip
    assert other_functions(model, function_values({}, "M*-")) == []
