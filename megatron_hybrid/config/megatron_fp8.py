"""Megatron-LM's FP8 flags, several of which together say what `precision.recipe` says.

There `--fp8-format` turns FP8 on, `--fp8-recipe` picks the scaling, `--bf16` says what the rest is
in, and `--first-last-layers-bf16` keeps one layer at either end. Here a recipe has its format.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatron_hybrid.config.precision import FLOAT8_RECIPES

RECIPE = "precision.recipe"
ENDS = ("precision.num_layers_at_start_in_bf16", "precision.num_layers_at_end_in_bf16")
RECIPES: Mapping[str, str] = MappingProxyType(
    {recipe.engine_name: name for name, recipe in FLOAT8_RECIPES.items() if name != "mxfp8"}
)
FORMAT, END_LAYERS = "--fp8-format", "--first-last-layers-bf16"
# Of delayed scaling, fixed as Transformer Engine has them by default.
FIXED = MappingProxyType(
    {"--fp8-amax-history-len": "1024", "--fp8-amax-compute-algo": "max", "--fp8-margin": "0"}
)
WITH_VALUE = (FORMAT, *FIXED)
FLAGS = (*WITH_VALUE, END_LAYERS)


def fp8_recipe_of(values: Sequence[tuple[str, Any]]) -> str:
    """The FP8 recipe that fields and values in order come to; "" where it is none."""
    recipe = dict(values).get(RECIPE)
    return recipe if isinstance(recipe, str) and recipe in FLOAT8_RECIPES else ""


def apply_fp8_flags(
    flags: dict[str, str], values: Sequence[tuple[str, Any]]
) -> tuple[list[tuple[str, Any]], list[str]]:
    """What is typed as Megatron-LM's FP8 flags, in this config's fields.

    Args:
        flags: each of `FLAGS` that was typed, and its word ("" where it takes none).
        values: fields and values of the rest of the command line, in order.

    Returns:
        All fields and values, and a sentence for each flag that cannot be taken so.
    """
    problems = []
    name_of_recipe = fp8_recipe_of(values)
    recipe = FLOAT8_RECIPES.get(name_of_recipe)
    for name, word in flags.items():
        if name == FORMAT and recipe is None:
            problems.append(
                f"{FORMAT} {word} needs --fp8-recipe; allowed: {', '.join(sorted(RECIPES))}, mxfp8"
            )
        elif name == FORMAT and recipe is not None and word != recipe.engine_format:
            problems.append(
                f"{FORMAT} {word} is not the format of {RECIPE}={name_of_recipe}; "
                f"allowed: {recipe.engine_format}"
            )
        elif name in FIXED and word != FIXED[name]:
            problems.append(f"{name} {word} is not supported; allowed: {FIXED[name]}")
    if END_LAYERS in flags:
        # First, so that --num-layers-at-start-in-bf16 stands where it is given.
        return [*((path, 1) for path in ENDS), *values], problems
    return list(values), problems
