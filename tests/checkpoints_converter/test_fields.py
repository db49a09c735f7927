"""Every field of every family's config class is read, held to our value, or without effect."""

import ast
import inspect
import math
from collections.abc import Mapping
from dataclasses import MISSING
from dataclasses import fields as dataclass_fields
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_converter.common_fields import COMMON
from checkpoints_converter.fields import Fields, Flag, MustBe, NoEffect, Number, Whole, names_of
from checkpoints_converter.registry import MODULES as EVERY
from checkpoints_converter.registry import family
from megatron_hybrid.config import ModelConfig
from tests.checkpoints_converter.peer_models import VOCAB_SIZE, nemotron_h, tokens
from tests.checkpoints_converter.test_families import (
    FACTORS,
    bamba,
    granite,
    mamba2,
    model_config,
    with_norm,
)

MODULES = [name for name in EVERY if family(name).in_transformers]
# A tiny model of each family, with every kind of layer that it has.
MODELS = {
    "nemotron_h": lambda **fields: nemotron_h("M*-E", **fields),
    "mamba2": mamba2,
    "bamba": bamba,
    "granitemoehybrid": lambda **fields: granite(
        num_local_experts=4, num_experts_per_tok=2, **fields
    ),
    "falcon_h1": lambda **fields: with_norm(mamba_d_ssm=None, **fields),
}
# Read by the modeling code of a config, and no field of a config.json.
NO_FIELDS = {"get_text_config"}


def config_class(model_type: str) -> Any:
    from transformers import AutoConfig

    return type(AutoConfig.for_model(model_type))


def attributes_of(source: str) -> set[str]:
    """Attributes of `config` and `self.config` that code reads, also by `getattr`."""

    def is_config(node: ast.expr) -> bool:
        return (isinstance(node, ast.Name) and node.id == "config") or (
            isinstance(node, ast.Attribute) and node.attr == "config"
        )

    found = set()
    node: Any
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            found.add(node.attr)
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if is_call and node.func.id == "getattr" and is_config(node.args[0]):
            found.add(str(node.args[1].value))
    return {name for name in found if not name.startswith("_")} - NO_FIELDS


def keywords_of(cls: Any) -> set[str]:
    """What a config class and its bases take out of `kwargs`: spellings that they map."""
    found = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("transformers."):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(base)))):
            if not (isinstance(node, ast.FunctionDef) and node.name in (
                "__post_init__", "convert_rope_params_to_dict"
            )):  # fmt: skip
                continue
            for call in ast.walk(node):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and isinstance(call.func.value, ast.Name)
                    and call.func.value.id == "kwargs"
                    and call.args
                    and isinstance(call.args[0], ast.Constant)
                ):
                    found.add(str(call.args[0].value))
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("model_type", MODULES)
def test_every_field_of_the_config_class_has_a_rule(model_type: str) -> None:
    """Fields, other spellings, what `__post_init__` maps, and what the modeling code reads."""
    import transformers

    cls = config_class(model_type)
    modeling = inspect.getmodule(getattr(transformers, family(model_type).architecture))
    assert modeling is not None
    names = {
        "fields": {field.name for field in dataclass_fields(cls)},
        "attribute_map": cls.attribute_map.keys() | set(cls.attribute_map.values()),
        "keywords": keywords_of(cls),
        "modeling": attributes_of(inspect.getsource(modeling)),
        "generation": set(transformers.GenerationConfig._get_default_generation_params()),
        "a saved config.json": set(MODELS[model_type]().config.to_dict()) - {"_name_or_path"},
    }
    assert {"vocab_size", "dtype"} <= names["fields"]
    assert {"torch_dtype", "rope_scaling", "per_layer_config"} <= names["keywords"]
    assert "hidden_size" in names["modeling"]
    if model_type == "nemotron_h":
        assert {"mamba_dt_limit", "mamba_d_conv", "mamba_n_groups"} <= names["keywords"]
    known = names_of(family(model_type).fields)
    for where, found in names.items():
        assert found - known.keys() == set(), f"{where} of {cls.__name__} without a rule"


@pytest.mark.parametrize("model_type", MODULES)
def test_defaults_are_theirs(model_type: str) -> None:
    """What a config.json leaves out is read as transformers reads it."""
    rules = family(model_type).fields
    for field in dataclass_fields(config_class(model_type)):
        rule = rules.get(field.name)
        if rule is None or isinstance(rule, NoEffect) or field.default is MISSING:
            continue
        assert rule.default == field.default, (field.name, rule.default, field.default)


def said(model_type: str, **fields: Any) -> dict[str, Any]:
    """A config.json of the family's tiny model, as transformers writes it."""
    import json

    return json.loads(MODELS[model_type](**fields).config.to_json_string(use_diff=False))


WRONG = (
    "4k", "", None, True, -1, 0, 0.5, math.nan, math.inf, 10**400, 2**80, [], {}, [{}], [None],
    {"x": 1}, "false",
)  # fmt: skip


@pytest.mark.parametrize("model_type", MODULES)
def test_values_of_every_kind_in_every_field(model_type: str) -> None:
    """Any value in any field: it is refused with its name, or it is of the type that is read."""
    right = said(model_type)
    chosen = family(model_type)
    assert chosen.read(right)[0].problems == []
    for name, rule in chosen.fields.items():
        for value in WRONG:
            fields, _ = chosen.read(right | {name: value})
            if isinstance(rule, NoEffect):
                assert fields.problems == [], (name, value, fields.problems)
                continue
            if not fields.problems:
                # 0.5 and 0 are numbers, {} is no override of a layer, and so on.
                fine = {
                    Whole: isinstance(value, int) and value is not True and 0 <= value < 2**31,
                    Number: isinstance(value, int | float) and value is not True,
                    Flag: value is True,
                }
                allowed = rule.allowed if isinstance(rule, MustBe) else ()
                same = any(value == each and type(value) is type(each) for each in allowed)
                null = value is None and rule.nullable
                text = name == "transformers_version" and isinstance(value, str)
                empty = value == [] or value == {}
                assert fine.get(type(rule), empty) or same or null or text, (name, value)
            else:
                assert any(name in problem for problem in fields.problems), (name, value)


# What another value of a field is, where the type does not say it.
OTHERS: dict[str, Any] = {
    "time_step_rank": 7, "mtp_layers_block_type": ["moe"], "mtp_hybrid_override_pattern": "E",
    "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5, "mamba_ssm_cache_dtype": "bfloat16",
    "id2label": {"0": "a"}, "label2id": {"a": 0}, "problem_type": "regression",
    "architectures": ["X"], "transformers_version": "5.23.0", "dtype": "float32",
    "model_type": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "rope_scaling": None, "partial_rotary_factor": 0.25, "rope_theta": 77.0, "head_dim": None,
    "experts_implementation": "eager", "attn_implementation": "eager", "name_or_path": "x",
    "intermediate_size": 99, "norm_before_gate": True, "time_step_init_scheme": "random",
    "time_step_scale": 2.0, "init_method": "mup", "use_mamba_kernels": False, "chunk_size": 8,
    "mamba_chunk_size": 8, "expand": 3, "output_attentions": True, "num_labels": 3,
    "tie_last_hidden_states": False, "temperature": 0.5, "return_dict": True,
}  # fmt: skip


REORDERED = {"chunk_size", "mamba_chunk_size", "attn_implementation", "experts_implementation",
             "output_attentions"}  # fmt: skip


def other(name: str, value: Any) -> Any:
    """Another value than the one that a model has; a sentinel where there is none to give."""
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 + 0.25
    return None


@pytest.mark.parametrize("model_type", MODULES)
def test_fields_without_effect_have_none(model_type: str) -> None:
    """transformers' logits with another value in each of them are bit for bit those without."""
    ids = tokens(20)

    def logits(**fields: Any) -> Tensor:
        with torch.no_grad():
            model = MODELS[model_type](**fields)
            logits: Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits
            return logits

    expected, tried = logits(), 0
    values = said(model_type)
    for name, rule in family(model_type).fields.items():
        if not isinstance(rule, NoEffect):
            continue
        changed = other(name, values.get(name, rule.default))
        if changed is None or changed == values.get(name):
            continue
        found = logits(**{name: changed})
        # The same sums, in another order.
        close = 1e-5 if name in REORDERED else 0.0
        assert (found - expected).abs().max() <= close * expected.std(), name
        tried += 1
    assert tried > 10


# Read, but of no part of the model: of its training's config, or of a note.
BESIDE = {"max_position_embeddings", "transformers_version"}


@pytest.mark.parametrize("model_type", MODULES)
def test_fields_that_are_read_are_used(model_type: str) -> None:
    """Another value in each of them gives another model, a note, or is refused."""
    right, chosen = said(model_type), family(model_type)
    fields, read = chosen.read(right)
    for name, rule in chosen.fields.items():
        if isinstance(rule, NoEffect) or name in BESIDE:
            continue
        value = right.get(name, rule.default)
        changed = USED.get(name, other(name, 1 if value is None else value))
        found, values = chosen.read(right | {name: changed})
        assert found.problems or found.notes != fields.notes or values != read, (name, changed)


USED: dict[str, Any] = {
    "layers_block_type": ["moe"], "layer_types": ["mlp"], "attn_layer_indices": [0],
    "mlp_hidden_act": "gelu", "mamba_hidden_act": "gelu", "hidden_act": "gelu", "head_dim": 14,
    "intermediate_size": 99, "position_embedding_type": "nope", "mamba_d_head": 3,
    "normalization_function": "layernorm", "time_step_limit": [0.0, 1.0],
    "ssm_multipliers": [2.0] * 5, "mlp_multipliers": [2.0, 2.0],
}  # fmt: skip

OURS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "hybrid_layer_pattern": "M*-E", "hidden_size": 64, "num_attention_heads": 4,
        "mamba_head_dim": 16, "mamba_num_groups": 2, "num_moe_experts": 4,
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 32,
    },
    "mamba2": {"hybrid_layer_pattern": "MM", "hidden_size": 64, "mamba_head_dim": 16,
               "mamba_num_groups": 2},
    "bamba": {
        "hybrid_layer_pattern": "M-*-", "hidden_size": 64, "num_attention_heads": 4,
        "mamba_head_dim": 16, "mamba_num_groups": 2, "activation": "swiglu",
        "position_embedding_type": "rope",
    },
    "granitemoehybrid": {
        "hybrid_layer_pattern": "ME*E", "hidden_size": 64, "num_attention_heads": 4,
        "mamba_head_dim": 16, "mamba_num_groups": 2, "activation": "swiglu",
        "num_moe_experts": 4, "moe_shared_expert_intermediate_size": 32,
    },
    "falcon_h1": {
        "hybrid_layer_pattern": "H-H-", "hidden_size": 64, "num_attention_heads": 4,
        "mamba_head_dim": 12, "mamba_num_heads": 6, "mamba_num_groups": 2, "activation": "swiglu",
        "position_embedding_type": "rope", "mamba_rms_norm": False, **FACTORS,
    },
}  # fmt: skip


def written(model_type: str, **change: Any) -> tuple[ModelConfig, dict[str, Any]]:
    model = model_config(OURS[model_type] | {"vocab_size": VOCAB_SIZE} | change)
    return model, family(model_type).config(model)


@pytest.mark.parametrize("model_type", MODULES)
def test_what_we_write_we_read(model_type: str) -> None:
    """An export's config.json has no field without a rule, and gives the model section back."""
    model, fields = written(model_type)
    found, values = family(model_type).read(fields)
    assert found.problems == []
    for name, value in values.items():
        assert getattr(model, name) == value, name


SPELLINGS = [
    ("nemotron_h", "head_dim", "attention_head_dim", 10, 7),
    ("nemotron_h", "n_groups", "mamba_n_groups", 2, 4),
    ("nemotron_h", "conv_kernel", "mamba_d_conv", 4, 3),
    ("nemotron_h", "use_conv_bias", "mamba_conv_bias", True, False),
    ("nemotron_h", "time_step_limit", "mamba_dt_limit", [0.0, math.inf], [0.1, 0.2]),
    ("nemotron_h", "n_routed_experts", "num_local_experts", 8, 9),
    ("nemotron_h", "layers_block_type", "hybrid_override_pattern", "M*-E", "M*-M"),
    ("granitemoehybrid", "layer_types", "layers_block_type", ["mamba", "attention", "mamba"],
     ["mamba", "mamba", "mamba"]),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "name", "spelling", "same", "differs"), SPELLINGS)
def test_other_spellings(
    model_type: str, name: str, spelling: str, same: Any, differs: Any
) -> None:
    """A field under its other name is the field; under both, they must agree."""
    right = said(model_type)
    chosen = family(model_type)
    alone = {each: value for each, value in right.items() if each != name}
    read = chosen.read(right)[1]
    assert chosen.read(alone | {spelling: same})[1] == read
    assert chosen.read(right | {spelling: same})[0].problems == []
    problems = chosen.read(right | {spelling: differs})[0].problems
    assert any(spelling in problem for problem in problems), problems
    changed, values = chosen.read(alone | {spelling: differs})
    assert changed.problems or values != read


def test_what_is_not_known_is_refused() -> None:
    """With what may have been meant, and a way on; names of the program that wrote it are fine."""
    right = said("nemotron_h") | {"_attn_implementation_autoset": True, "auto_map": {"a": "b"}}
    chosen = family("nemotron_h")
    assert chosen.read(right)[0].problems == []
    (problem,) = chosen.read(right | {"hidden_sizes": 64})[0].problems
    assert "hidden_sizes=64 is a field that is not known here; did you mean hidden_size?" in problem
    fields, _ = chosen.read(right | {"hidden_sizes": 64}, ignored=("hidden_sizes",))
    assert (fields.problems, fields.notes) == ([], chosen.read(right)[0].notes)
    said_so = chosen.read(right, ignored=("hidden_size", "hidden_sizes"))[0].notes
    assert [note for note in said_so if "--ignore-field" in note] == [
        "--ignore-field hidden_size changes nothing: it is known here",
        "--ignore-field hidden_sizes changes nothing: it is not there",
    ]


def test_published_names_that_other_programs_read() -> None:
    """rms_norm_eps beside layer_norm_epsilon, Bamba's rotating channels: both say the same."""
    nemotron, peer = family("nemotron_h"), said("nemotron_h")
    assert nemotron.read(peer | {"rms_norm_eps": 1e-5})[0].problems == []
    assert nemotron.read(peer | {"rms_norm_eps": 1e-6})[0].problems
    attention, peer = family("bamba"), said("bamba")
    assert attention.read(peer | {"attn_rotary_emb": 6})[0].problems == []
    (problem,) = attention.read(peer | {"attn_rotary_emb": 12})[0].problems
    assert problem.startswith("attn_rotary_emb=12 must be 6")


@pytest.mark.parametrize("model_type", MODULES)
def test_what_earlier_releases_write_is_read(model_type: str) -> None:
    """Fields that releases before the installed one write by themselves, with their defaults."""
    peer = said(model_type) | {"time_step_min": 0.001, "time_step_max": 0.1}
    peer |= {"time_step_limit": [0.0, math.inf], "use_mamba_kernels": True}
    assert family(model_type).read(peer)[0].problems == []


def test_a_field_that_does_not_matter_may_be_anything() -> None:
    """Sizes of layers that a model has none of."""
    model = said("nemotron_h") | {"layers_block_type": ["mlp"], "conv_kernel": 3, "use_bias": True}
    assert family("nemotron_h").read(model)[0].problems == []


def test_rules_are_complete() -> None:
    """A field that is looked up must have a rule: none can be read past the table."""
    fields = Fields({}, COMMON)
    with pytest.raises(KeyError):
        fields["hidden_size"]
    assert isinstance(COMMON, Mapping)
