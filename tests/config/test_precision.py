"""Which models and layouts float8 takes: widths of the published models, and what to change."""

import pytest

from megatron_hybrid.config import load_config, validate
from megatron_hybrid.config.linears import linears
from megatron_hybrid.config.pattern import MAMBA
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.errors import ConfigError

DATA = ["data.mock_data=true", "data.tokenizer_type=null", "model.vocab_size=131072"]
# As it is, its in_proj has 648 outputs.
TINY = ["tiny", "model.mamba_num_heads=32", "model.mamba_head_dim=16"]
# The pruned Nemotron Nano 7B: 120 heads of 80 channels.
PRUNED_7B = [
    "nemotron_nano_9b_v2", "model.hidden_size=4352", "model.mamba_num_heads=120",
    "model.mamba_head_dim=80", "model.ffn_hidden_size=13824",
    "model.hybrid_layer_pattern=M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-MMMM-M-",
]  # fmt: skip


def problems(*line: str, tp: int = 1, recipe: str = "fp8_tensorwise") -> str:
    try:
        load_config(
            [
                *line, *DATA, f"precision.recipe={recipe}",
                f"parallel.tensor_model_parallel_size={tp}",
                f"parallel.sequence_parallel={str(tp > 1).lower()}",
            ]
        )  # fmt: skip
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("model", "width"),
    [("nemotron_h_8b", 18560), ("nemotron_h_56b", 37120), ("nemotron_nano_12b_v2", 22656),
     ("nemotron_nano_9b_v2", 22656), ("nemotron_h_4b", 16496)],
)  # fmt: skip
def test_published_models_fit_whole(model: str, width: int) -> None:
    """in_proj has the published width, which one rank takes."""
    config = load_config([model, *DATA])
    assert linears(config.model, MAMBA)["in_proj"].outputs == width
    assert problems(model) == ""


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_the_4b_does_not_divide(tp: int) -> None:
    """112 heads: no tensor-parallel rank's part of in_proj is a multiple of 16."""
    found = problems("nemotron_h_4b", tp=tp)
    width = 16496 // tp
    below = width - width % 16
    assert found.count("\n") == 1
    assert f"in_proj of a Mamba-2 layer has {width} outputs on each of {tp} tensor" in found
    assert f"must be a multiple of 16; nearest: {below}, {below + 16}" in found
    heads = {2: "96, 128", 4: "64, 128", 8: "128"}[tp]
    assert f"nearest model.mamba_num_heads: {heads}" in found
    for number in heads.split(", "):
        assert problems("nemotron_h_4b", f"model.mamba_num_heads={number}", tp=tp) == ""


@pytest.mark.parametrize("model", ["nemotron_h_8b", "nemotron_h_56b", "nemotron_nano_12b_v2"])
def test_published_models_fit_on_eight_ranks(model: str) -> None:
    """TP8, as they were trained."""
    assert problems(model, tp=8) == ""


def test_the_pruned_7b_does_not_fit() -> None:
    """Its in_proj makes 21,368 channels; the two layers at either end are in BF16 and not asked."""
    found = problems(*PRUNED_7B)
    assert "in_proj of a Mamba-2 layer has 21368 outputs, which must be a multiple of 16" in found
    assert problems(*PRUNED_7B, recipe="bf16") == ""


def test_end_layers_are_not_asked() -> None:
    """A width that only layers in BF16 have is no problem."""
    odd = ["nemotron_h_8b", "model.hybrid_layer_pattern=-M*M-", "model.ffn_hidden_size=24"]
    assert "linear_fc1" in problems(*odd, "precision.num_layers_at_start_in_bf16=0")
    assert problems(*odd) == ""


@pytest.mark.parametrize("recipe", FLOAT8_RECIPES)
def test_where_it_runs(recipe: str) -> None:
    """Without a GPU it must be asked for as emulated; with one it may not be."""

    def refused(has_cuda: bool, emulate: str) -> str:
        line = [*TINY, *DATA, f"precision.recipe={recipe}", f"precision.emulate={emulate}"]
        try:
            load_config(line, has_cuda=has_cuda)
        except ConfigError as error:
            return str(error)
        return ""

    assert "needs a GPU and Transformer Engine; allowed here: precision.emulate" in refused(
        False, "false"
    )
    assert "precision.emulate=true is of the CPU" in refused(True, "true")
    assert refused(True, "false") == refused(False, "true") == ""


def test_what_contradicts() -> None:
    """Everything at once, each with what is allowed."""
    found = problems(
        *TINY, "precision.emulate=true", "precision.fp8_param_gather=true",
        "precision.num_layers_at_end_in_bf16=1", recipe="bf16",
    )  # fmt: skip
    assert found.count("allowed: fp8_tensorwise, fp8_blockwise, fp8_delayed, mxfp8") == 3
    found = problems(*TINY, "precision.num_layers_at_start_in_bf16=1", recipe="fp8_delayed")
    assert "num_layers_at_start_in_bf16=1 must be 0 with precision.recipe=fp8_delayed" in found
    found = problems(*TINY, "precision.num_layers_at_start_in_bf16=7", recipe="mxfp8", tp=1)
    assert found == ""
    found = problems(*TINY, "precision.num_layers_at_start_in_bf16=8", recipe="mxfp8")
    assert "must leave some of the 8 layers" in found
    found = problems(*TINY, "data.seq_length=1028", "training.micro_batch_size=1")
    assert "1028 tokens on a rank must be a multiple of 8" in found


def test_parts_that_are_not_equal() -> None:
    """Ranks that cannot share the heads are told of so, not of widths that there will not be."""
    found = problems("nemotron_h_8b", tp=3)
    assert "parallel.tensor_model_parallel_size=3 must divide model.mamba_num_heads" in found
    assert "precision.recipe" not in found


def test_megatrons_flags() -> None:
    """The names of Megatron-LM's recipes, and its flags for the layers at the ends."""
    config = load_config(
        [*TINY, *DATA, "--fp8-recipe", "tensorwise", "--num-layers-at-start-in-bf16", "1",
         "--fp8-param-gather"]
    )  # fmt: skip
    precision = config.precision
    assert (precision.recipe, precision.fp8_param_gather) == ("fp8_tensorwise", True)
    assert (precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16) == (1, 2)


# Those that Transformer Engine 2.20.2 lets in, on each GPU; delayed scaling would be too.
RUNS_ON = {
    (8, 0): set(),
    (8, 9): {"fp8_tensorwise"},
    (9, 0): {"fp8_tensorwise", "fp8_blockwise"},
    (10, 0): {"fp8_tensorwise", "fp8_blockwise", "mxfp8"},
    (12, 0): {"fp8_tensorwise", "fp8_blockwise"},
}  # fmt: skip


@pytest.mark.parametrize("recipe", FLOAT8_RECIPES)
@pytest.mark.parametrize("capability", RUNS_ON)
def test_recipes_by_gpu(capability: tuple[int, int], recipe: str) -> None:
    """What the GPU has no units for is refused with what it has; the delayed one on all, as
    Transformer Engine does not take back the history that it saves.
    """
    config = load_config([*TINY, *DATA, f"precision.recipe={recipe}"])
    runs = RUNS_ON[capability]
    try:
        validate(config, has_cuda=True, compute_capability=capability)
    except ConfigError as error:
        found = str(error)
    else:
        found = ""
    assert bool(found) == (recipe not in runs)
    if recipe == "fp8_delayed":
        assert "refuses to load the history of scales that it saves" in found
    elif found:
        here = ".".join(map(str, capability))
        assert f"; here it is {here}; allowed here: bf16, fp32" in found
        assert (
            set(found.partition("allowed here: bf16, fp32")[2].strip(", ").split(", ")) - {""}
            == runs
        )


def test_delayed_scaling_needs_no_gpu_to_be_refused() -> None:
    """Where the backend is named, nothing need be known of the device; emulated it runs."""
    assert "fp8_delayed on the transformer_engine backend is not supported" in problems(
        *TINY, "backend=transformer_engine", recipe="fp8_delayed"
    )
    assert problems(*TINY, "precision.emulate=true", recipe="fp8_delayed") == ""
