"""Every field is classified by what it does to the function that a model computes."""

from typing import Any

import pytest

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.check import build_config
from megatron_hybrid.config.describe import fields
from megatron_hybrid.config.effects import _FIELDS, EFFECTS, differences, differing_fields
from megatron_hybrid.config.precision import FLOAT8_RECIPES


def test_every_field_has_one_effect() -> None:
    """A new field must be looked at: is the model the same function, wherever it computes?"""
    assert sorted(name for names in _FIELDS.values() for name in names.split()) == sorted(fields())


def test_what_differs_is_said() -> None:
    """Fields that leave two functions are named by a difference, which a run prints."""
    differ = {name for name, effect in EFFECTS.items() if effect == "differs"}
    assert differ == {name for name in differing_fields() if EFFECTS[name] != "training"}


def config(**sections: dict[str, Any]) -> RunConfig:
    model = {"hybrid_layer_pattern": "ME", "hidden_size": 64, "num_moe_experts": 4}
    model |= sections.pop("model", {})
    return build_config({"model": model, "optimizer": {"lr": 1e-3}} | sections, which=())


@pytest.mark.parametrize(
    ("sections", "begin"),
    [
        ({"model": {"moe_expert_capacity_factor": 1.5}}, "model.moe_expert_capacity_factor=1.5: "),
        ({"gpu": {"moe_router_fusion": True}}, "gpu.moe_router_fusion=true: "),
        *(
            ({"precision": {"recipe": recipe}}, f"precision.recipe={recipe}: ")
            for recipe in FLOAT8_RECIPES
        ),
    ],
)
def test_a_config_says_how_it_differs(sections: dict[str, Any], begin: str) -> None:
    """One sentence each, with the field and its value; by default there is none."""
    (sentence,) = differences(config(**sections))
    assert sentence.startswith(begin)
    assert differences(config()) == []
