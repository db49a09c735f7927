"""What is layer i: entries of `model.layers` by number, range and kind, and what follows."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.cli_text import unlike_layers_text
from megatron_hybrid.config import RunConfig, load_config, rules
from megatron_hybrid.config.layers import (
    are_unlike,
    in_the_model,
    layers,
    layers_of,
    sorts,
    unlike_problem,
)
from megatron_hybrid.config.notes import notes
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.errors import ConfigError
from tests.config import GOOD


def config(*words: str) -> RunConfig:
    """Of the pattern M-M*MEM-."""
    return load_config([*GOOD, *words], which=rules.NO_FILES)


def heads(made: RunConfig) -> dict[int, Any]:
    return {layer.number: layer.model.mamba_num_heads for layer in layers_of(made.model, "M")}


@pytest.mark.parametrize(
    "words",
    [
        ["model.layers.M.mamba_num_heads=2", "model.layers.3-5.mamba_num_heads=4",
         "model.layers.5.mamba_num_heads=6"],
        ["model.layers.5.mamba_num_heads=6", "model.layers.3-5.mamba_num_heads=4",
         "model.layers.M.mamba_num_heads=2"],
        ["model.layers={5: {mamba_num_heads: 6}, M: {mamba_num_heads: 2},"
         " 3-5: {mamba_num_heads: 4}, 1-5: {activation: gelu}}"],
    ],
)  # fmt: skip
def test_fewer_layers_win(words: list[str]) -> None:
    """A number over a range, a range over a kind, in whatever order they stand."""
    assert heads(config(*words)) == {1: 2, 3: 4, 5: 6, 7: 2}


def test_what_an_entry_does_not_say_is_the_models() -> None:
    """Null is said: a window of no layer but those of the model, a shared expert of none."""
    made = config("--window-size", "64,0", "model.layers.4.window_size=null",
                  "model.layers.E.moe_shared_expert_intermediate_size=null",
                  "model.layers.3.mamba_head_dim=16")  # fmt: skip
    by_number = {layer.number: layer for layer in layers(made.model)}
    assert by_number[4].own == {"window_size": None}
    assert by_number[6].own == {"moe_shared_expert_intermediate_size": None}
    assert by_number[3].sizes == {
        "mamba_version": 2, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 32,
        "mamba_num_groups": 2,
    }  # fmt: skip
    assert made.model.window_size == (64, 0)


def test_a_layer_has_the_sizes_of_its_version() -> None:
    """What is said of a kind goes to layers of the version that knows it; sizes are derived where
    any layer has that version."""
    made = config("model.layers={M: {mamba_num_heads: 4, mamba_dt_rank: 3}, 3: {mamba_version: 1}}")
    mamba = {each.number: each for each in layers(made.model) if each.kind == "M"}
    assert mamba[3].own == {"mamba_version": 1, "mamba_dt_rank": 3}
    assert mamba[3].sizes["mamba_intermediate_size"] == 2 * made.model.hidden_size
    assert mamba[1].own == {"mamba_num_heads": 4}
    assert [each.what for each in mamba.values()] == ["Mamba-2", "Mamba-1", "Mamba-2", "Mamba-2"]
    rank = config("model.mamba_version=1", "model.hidden_size=40").model
    assert (rank.mamba_dt_rank, rank.mamba_intermediate_size) == (3, 80)
    assert rank.mamba_num_heads is None


def test_a_range_is_for_the_layers_that_have_its_fields() -> None:
    """Each field goes to the kinds that know it."""
    made = config("model.layers.4-8={activation: gelu, mamba_num_heads: 4}")
    gelu = [n.number for n in layers(made.model) if "activation" in n.own]
    assert gelu == [6, 8]
    assert heads(made) == {1: 8, 3: 8, 5: 4, 7: 4}


def test_sorts_are_by_what_layers_are_alike_in() -> None:
    """By kind, then by first places; entries that say the model's own sizes make no other layer."""
    made = config("model.layers.M.mamba_num_heads=8", "model.layers.5.mamba_num_heads=4")
    found = [(sort.kind, sort.numbers) for sort in sorts(made.model)]
    assert found == [("M", (1, 3, 7)), ("M", (5,)), ("*", (4,)), ("-", (2, 8)), ("E", (6,))]
    alike = config("model.layers.M.mamba_num_heads=8").model
    assert not are_unlike(alike)
    assert unlike_problem(alike, "this") is None
    for model in (alike, config().model):
        symbols = parse_pattern(model.hybrid_layer_pattern).layers
        assert [layer.kind for layer in layers(model)] == list(symbols)
        assert [len(sort.numbers) for sort in sorts(model)] == [4, 1, 2, 1]


def test_sizes_that_every_layer_says_need_not_be_the_models() -> None:
    """Nor need those follow from others of the model: heads, experts, and what is derived."""
    sizes = {
        "*": {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 24},
        "M": {"mamba_num_heads": 6}, "E": {"num_moe_experts": 2, "moe_ffn_hidden_size": 16},
    }  # fmt: skip
    unsaid = ["model.mamba_head_dim=48"]  # by which 2 * hidden_size is not divided
    unsaid += [f"model.{name}=null" for of_kind in sizes.values() for name in of_kind]
    entries = [f"model.layers.{kind}={json.dumps(of)}" for kind, of in sizes.items()]
    said = [f"model.{name}={size}" for of in sizes.values() for name, size in of.items()]
    made = config(*unsaid, *entries).model
    assert made.num_attention_heads is made.mamba_num_heads is made.num_moe_experts is None
    assert in_the_model(made) == config(*unsaid, *said).model
    assert config(*unsaid, *entries, "model.num_attention_heads=5").model.kv_channels is None
    for kind, lacking in (("*", "kv_channels"), ("M", "mamba_num_heads"), ("E", "num_moe_experts")):
        one = [*entries, f"model.hybrid_layer_pattern=M*EM*E-{kind}"]
        some = [word for word in one if not word.startswith(f"model.layers.{kind}=")]
        some += [f"model.layers.1-6={json.dumps(sizes[kind])}"]
        with pytest.raises(
            ConfigError, match=rf"model\.{lacking} is not set|num_attention_heads is"
        ):
            config(*unsaid, *some)


def test_sizes_of_whole_kinds_are_the_models() -> None:
    """For what knows one size of a kind: an export, Megatron-LM's arguments."""
    said = config("model.layers={M: {mamba_num_heads: 4}, '*': {window_size: [8, 0]}, 2-8:"
                  " {activation: gelu}}").model  # fmt: skip
    words = ("model.mamba_num_heads=4", "model.window_size=[8,0]", "model.activation=gelu")
    assert in_the_model(said) == config(*words).model
    assert unlike_problem(said, "this") is None
    first = "layer 3 has model.layers.3.mamba_num_heads=4 and layer 1 model.mamba_num_heads=8: "
    gelu = "layer 6 has model.activation=squared_relu and layer 2 model.layers.-.activation=gelu"
    for other, told in (("3.mamba_num_heads=4", first), ("-.activation=gelu", gelu)):
        other = f"model.layers.{other}"
        model = config(other).model
        assert in_the_model(model) == model
        assert (unlike_problem(model, "this") or "").startswith(told)


def test_the_resolved_config_reads_back(tmp_path: Path) -> None:
    """YAML with numbers for names; what entries do not say is not written, null is."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: tiny\nmodel:\n  vocab_size: 256\n  layers:\n    3: {mamba_num_heads: 4}\n"
        '    "*": {window_size: null}\n    2-8: {activation: gelu}\n'
    )
    made = load_config([str(file), "model.layers.3.mamba_head_dim=16"], which=rules.NO_FILES)
    assert made.model_dump(mode="json")["model"]["layers"] == {
        "3": {"mamba_num_heads": 4, "mamba_head_dim": 16},
        "*": {"window_size": None},
        "2-8": {"activation": "gelu"},
    }
    file.write_text(made.to_yaml() + unlike_layers_text(made))
    again = load_config([str(file)], which=rules.NO_FILES)
    assert again == made
    assert layers(again.model) == layers(made.model)


def test_every_layer_is_shown_where_some_are_unlike() -> None:
    """A line each with all that it has; nothing where all are alike."""
    assert unlike_layers_text(config()) == ""
    lines = unlike_layers_text(config("model.layers.2.ffn_hidden_size=64")).splitlines()
    assert len(lines) == 9
    assert lines[2] == "#    2 - ffn_hidden_size=64, activation=squared_relu"
    assert lines[8] == "#    8 - ffn_hidden_size=512, activation=squared_relu"
    assert "window_size=null" in lines[4]


def test_sizes_that_no_layer_has_are_noted() -> None:
    """The model's where each layer of the kind says its own."""
    said = "model.mamba_state_dim=64 has no effect: model.layers says it of every layer"
    words = ("model.mamba_state_dim=64", "model.layers.M.mamba_state_dim=16")
    assert said in notes(config(*words))
    assert said not in notes(config(words[0], "model.layers.3.mamba_state_dim=16"))


@pytest.mark.parametrize(
    "words",
    [
        ["backend=transformer_engine", "--bias-activation-fusion",
         "model.layers={-: {activation: swiglu}, E: {activation: swiglu}}"],
        ["--hybrid-layer-pattern", "*-E", "--attn-mask-type", "no_mask", "--window-size", "64,0",
         "model.layers.*.window_size=null"],
    ],
)  # fmt: skip
def test_sizes_that_no_layer_has_break_no_rule(words: list[str]) -> None:
    """Where each layer says its own, the model's may be what no layer could be."""
    config(*words)
