"""Float8: what Transformer Engine and the engine make of our recipes is what our table says."""

from typing import NamedTuple

import pytest
import torch.distributed as dist

from megatron_hybrid.config import load_config, rules
from megatron_hybrid.config.precision import AMAX_HISTORY, FLOAT8_RECIPES, float8_layers
from megatron_hybrid.generation import ONE_RANK
from tests.gpu_on_cpu.ranks import run_on_gpus

PRESET = "nemotron_h_8b"
CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
SCALINGS = {
    "current": "Float8CurrentScaling",
    "tiles": "Float8BlockScaling",
    "delayed": "DelayedScaling",
    "blocks": "MXFP8BlockScaling",
}

# By their largest number, as Transformer Engine has them.
FORMATS = {448: "e4m3", 57344: "e5m2"}


class Found(NamedTuple):
    """What became of a recipe on a device.

    Attributes:
        refusal: what Transformer Engine said on entering it, if it did.
        layers: numbers of the layers whose products are in float8.
        classes: of its recipe, from the most special one.
        formats: of weights and activations, and of gradients.
        history: how many steps delayed scaling goes by.
    """

    refusal: str | None
    layers: list[int]
    classes: list[str]
    formats: tuple[str, str]
    history: int | None


def enter_recipes() -> dict[str, Found]:
    """On a rank, each on a device of its own: each recipe entered for each layer."""
    from tests.gpu_on_cpu import device

    device.set_capability(CAPABILITIES[dist.get_rank()])
    return {name: enter(name) for name in FLOAT8_RECIPES}


def enter(name: str) -> Found:
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_hybrid.model.transformer_config import transformer_config
    from megatron_hybrid.platform.torch_view import CPU

    config = load_config([PRESET, *ONE_RANK, f"precision.recipe={name}"], which=rules.NO_FILES)
    engine_config = transformer_config(config, "transformer_engine", CPU)
    recipe = get_fp8_recipe(engine_config)
    layers, refusal = [], None
    try:
        for index in range(engine_config.num_layers):
            with get_fp8_context(engine_config, index):
                if FP8GlobalStateManager.is_fp8_enabled():
                    layers.append(index + 1)
    except (AssertionError, RuntimeError) as error:
        refusal = str(error)
    formats = recipe.fp8_format.value
    return Found(
        refusal,
        layers,
        [each.__name__ for each in type(recipe).mro()],
        (FORMATS[formats.max_fwd], FORMATS[formats.max_bwd]),
        getattr(recipe, "amax_history_len", None),
    )


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, int], dict[str, Found]]:
    """By capability and recipe."""
    ranks = run_on_gpus(enter_recipes, len(CAPABILITIES))
    return dict(zip(CAPABILITIES, ranks, strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("name", FLOAT8_RECIPES)
def test_where_recipes_run(
    name: str,
    capability: tuple[int, int],
    found: dict[tuple[int, int], dict[str, Found]],
) -> None:
    """Transformer Engine accepts a recipe where our table, by which rules go, says it runs."""
    refusal = found[capability][name].refusal
    if FLOAT8_RECIPES[name].runs_on(capability):
        assert refusal is None
    else:
        assert refusal is not None and ("compute capability" in refusal or "12.0+" in refusal)


@pytest.mark.parametrize("name", FLOAT8_RECIPES)
def test_what_recipes_are(name: str, found: dict[tuple[int, int], dict[str, Found]]) -> None:
    """Scaling, formats and the layers in float8 are those of our table, on Blackwell."""
    got, ours = found[10, 0][name], FLOAT8_RECIPES[name]
    assert SCALINGS[ours.scaling] in got.classes
    assert got.formats == ("e4m3", ours.gradients)
    config = load_config([PRESET, *ONE_RANK, f"precision.recipe={name}"], which=rules.NO_FILES)
    assert got.layers == float8_layers(config)
    assert got.history == (AMAX_HISTORY if ours.scaling == "delayed" else None)
