"""Rules of the number formats: where float8 can run, and the widths that it takes."""

from math import lcm

from megatron_hybrid.config.layers import Layer, sorts
from megatron_hybrid.config.linears import linears
from megatron_hybrid.config.pattern import (
    ATTENTION,
    MAMBA,
    MLP,
    PARALLEL,
    has_kind,
    parse_pattern,
)
from megatron_hybrid.config.phases import sequence_length_fields
from megatron_hybrid.config.precision import FLOAT8_RECIPES, float8_layers
from megatron_hybrid.config.ranks import rank_tokens, sequence_ranks, written
from megatron_hybrid.config.rules.common import Facts, Problems, Rule, on_transformer_engine
from megatron_hybrid.config.rules.parallel import (
    expert_parallel,
    sequence_length,
    tensor_parallel,
)
from megatron_hybrid.config.run import RunConfig

_START = "precision.num_layers_at_start_in_bf16"
_END = "precision.num_layers_at_end_in_bf16"
_WHOSE = {
    ATTENTION: "an attention layer", MLP: "an MLP layer", PARALLEL: "a layer of parallel heads",
}  # fmt: skip


def float8_only(c: RunConfig, _: Facts) -> Problems:
    """What belongs to float8 needs a recipe of it."""
    p = c.precision
    if p.recipe in FLOAT8_RECIPES:
        return
    for name in ("fp8_param_gather", "emulate"):
        if getattr(p, name):
            yield f"precision.{name}=true needs a recipe in float8, not {_recipe(c)}; {_allowed()}"
    for name, layers in ((_START, p.num_layers_at_start_in_bf16),
                         (_END, p.num_layers_at_end_in_bf16)):  # fmt: skip
        if layers:
            yield f"{name}={layers} needs a recipe in float8, not {_recipe(c)}; {_allowed()}"


def end_layers(c: RunConfig, _: Facts) -> Problems:
    """Some layer must be left for float8; delayed scaling has them all in it."""
    p = c.precision
    start, end = p.num_layers_at_start_in_bf16 or 0, p.num_layers_at_end_in_bf16 or 0
    if p.recipe not in FLOAT8_RECIPES:
        return
    if p.recipe == "fp8_delayed":
        for name, layers in ((_START, start), (_END, end)):
            if layers:
                yield f"{name}={layers} must be 0 with {_recipe(c)}; allowed: 0"
    layers = parse_pattern(c.model.hybrid_layer_pattern).num_layers
    if start + end >= layers:
        yield (
            f"{_START}={start} and {_END}={end} must leave some of the {layers} layers of "
            f"model.hybrid_layer_pattern; allowed: up to {layers - 1} together"
        )


def where_float8_runs(c: RunConfig, facts: Facts) -> Problems:
    """Transformer Engine has the real thing on GPUs; anywhere else it is emulated, when asked."""
    p = c.precision
    if p.recipe not in FLOAT8_RECIPES or facts.has_cuda is None:
        return
    if facts.has_cuda and p.emulate:
        yield (
            "precision.emulate=true is of the CPU, and here is a GPU, on which Transformer Engine "
            "runs the recipe itself; allowed: false, or CUDA_VISIBLE_DEVICES= (empty)"
        )
    if not facts.has_cuda and not p.emulate:
        yield (
            f"{_recipe(c)} needs a GPU and Transformer Engine; allowed here: "
            "precision.emulate=true (the same numbers, slowly), precision.recipe=bf16 or fp32"
        )
    if p.emulate and p.fp8_param_gather:
        yield (
            "precision.fp8_param_gather=true with precision.emulate=true is not supported: "
            "parameters stay in bf16; allowed: false"
        )


def recipe_of_this_gpu(c: RunConfig, facts: Facts) -> Problems:
    """Transformer Engine refuses a recipe that the GPU has no units for, in the first forward."""
    recipe, here = FLOAT8_RECIPES.get(c.precision.recipe), facts.compute_capability
    if recipe is None or here is None or not on_transformer_engine(c, facts):
        return
    if not recipe.runs_on(here):
        wanted = f"{_version(recipe.capability)} or higher"
        if recipe.capability_below is not None:
            wanted += f", below {_version(recipe.capability_below)}"
        others = [
            name
            for name, other in FLOAT8_RECIPES.items()
            if other.runs_on(here) and other.scaling != "delayed"
        ]
        yield (
            f"{_recipe(c)} needs a GPU of compute capability {wanted}; here it is "
            f"{_version(here)}; allowed here: {', '.join(['bf16', 'fp32', *others])}"
        )


def delayed_scaling_resumes(c: RunConfig, facts: Facts) -> Problems:
    """Transformer Engine does not take back the history that it saved."""
    if c.precision.recipe != "fp8_delayed" or c.precision.emulate:
        return
    # Where GPUs are only planned for, it may be asked for.
    if c.backend == "transformer_engine" or facts.compute_capability is not None:
        others = [name for name, other in FLOAT8_RECIPES.items() if other.scaling != "delayed"]
        yield (
            f"{_recipe(c)} on the transformer_engine backend is not supported: Transformer Engine "
            "refuses to load the history of scales that it saves, so that no run could be "
            f"resumed; allowed: bf16, fp32, {', '.join(others)}, or precision.emulate=true on a CPU"
        )


def context_parallel_in_fp32(c: RunConfig, facts: Facts) -> Problems:
    """Attention over a sequence that is split has kernels for 16 bits alone."""
    cp = c.parallel.context_parallel_size
    attends = has_kind(c.model.hybrid_layer_pattern, ATTENTION)
    if c.precision.weights != "bf16" and cp > 1 and attends and on_transformer_engine(c, facts):
        yield (
            f"{_recipe(c)} with parallel.context_parallel_size={cp} has no attention kernel on the "
            "transformer_engine backend; allowed: precision.recipe=bf16, or "
            "parallel.context_parallel_size=1"
        )


def float8_widths(c: RunConfig, facts: Facts) -> Problems:
    """Each linear in float8 has widths that the hardware takes, on every rank.

    Where the ranks do not get equal parts, that is told first.
    """
    recipe = FLOAT8_RECIPES.get(c.precision.recipe)
    divides = not [*tensor_parallel(c, facts), *expert_parallel(c, facts)]
    if recipe is None or not divides:
        return
    p, numbers = c.parallel, set(float8_layers(c))
    tp, etp = p.tensor_model_parallel_size, p.expert_tensor_parallel_size or 1
    in_float8 = [sort for sort in sorts(c.model) if numbers.intersection(sort.numbers)]
    told: set[tuple[str, int]] = set()
    for sort in sorted(in_float8, key=lambda sort: sort.kind):
        for linear, widths in linears(sort.model, sort.kind, tp=tp, etp=etp).items():
            for name, width in (("inputs", widths.inputs), ("outputs", widths.outputs)):
                # The hidden size is in every linear, and told of once.
                at_end = width == c.model.hidden_size
                key = ("", width) if at_end else (f"{sort.kind}{linear}", width)
                if width % recipe.width_multiple and key not in told:
                    told.add(key)
                    yield _width_problem(c, sort.layer, linear, name, width, recipe.width_multiple)


def _width_problem(
    c: RunConfig, layer: Layer, linear: str, name: str, width: int, multiple: int
) -> str:
    below = width - width % multiple
    near = ", ".join(str(n) for n in (below, below + multiple) if n)
    tp = c.parallel.tensor_model_parallel_size
    shared = f" on each of {tp} tensor-parallel ranks" if tp > 1 else ""
    ways = ""
    if "mamba_num_heads" in layer.sizes and linear == "in_proj" and name == "outputs":
        ways = f"; nearest {layer.path('mamba_num_heads')}: {_near_heads(c, layer, multiple)}"
    whose = _WHOSE.get(layer.kind, f"a {layer.what} layer")
    if layer.own:
        whose = f"layer {layer.number}, {whose},"
    return (
        f"{_recipe(c)}: {linear} of {whose} has {width} {name}{shared}, "
        f"which must be a multiple of {multiple}; nearest: {near}{ways}"
    )


def _near_heads(c: RunConfig, layer: Layer, multiple: int) -> str:
    """The numbers of Mamba-2 heads next to the layer's with which in_proj has a good width."""
    tp, heads = c.parallel.tensor_model_parallel_size, layer.model.mamba_num_heads
    assert heads is not None

    def works(number: int) -> bool:
        model = layer.model.model_copy(update={"mamba_num_heads": number})
        return number > 0 and not any(
            width % multiple
            for linear in linears(model, MAMBA, tp=tp).values()
            for width in (linear.inputs, linear.outputs)
        )

    whole = lcm(tp, layer.model.mamba_num_groups)
    first, reach = heads // whole * whole, 16 * multiple
    down = (first - step * whole for step in range(reach))
    up = (first + step * whole for step in range(1, reach))
    below = next((n for n in down if n < heads and works(n)), None)
    above = next((n for n in up if works(n)), None)
    return ", ".join(str(n) for n in (below, above) if n) or "none"


def float8_meta_tokens(c: RunConfig, _: Facts) -> Problems:
    """Rows with them have other numbers of tokens than those that a recipe is held against."""
    if c.precision.recipe in FLOAT8_RECIPES and c.model.num_meta_tokens:
        yield (
            f"{_recipe(c)} with model.num_meta_tokens={c.model.num_meta_tokens} is not supported; "
            "allowed: precision.recipe=bf16 or fp32"
        )


def float8_tokens(c: RunConfig, facts: Facts) -> Problems:
    """The tokens that a rank quantises, its shard under sequence parallelism, come in whole blocks.

    Where the ranks do not get equal parts, that is told first.
    """
    recipe = FLOAT8_RECIPES.get(c.precision.recipe)
    if recipe is None or [*sequence_length(c, facts)]:
        return
    for name, length in sequence_length_fields(c).items():
        tokens = rank_tokens(c, length)
        if tokens % recipe.tokens_multiple:
            yield (
                f"{_recipe(c)}: {name}={length} * "
                f"training.micro_batch_size={c.training.micro_batch_size} / "
                f"({written(sequence_ranks(c))}) = {tokens} tokens on a rank must be a "
                f"multiple of {recipe.tokens_multiple}"
            )


def _recipe(c: RunConfig) -> str:
    return f"precision.recipe={c.precision.recipe}"


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _allowed() -> str:
    return f"allowed: {', '.join(FLOAT8_RECIPES)}"


PRECISION: tuple[Rule, ...] = (
    float8_only,
    end_layers,
    where_float8_runs,
    recipe_of_this_gpu,
    delayed_scaling_resumes,
    context_parallel_in_fp32,
    float8_widths,
    float8_meta_tokens,
    float8_tokens,
)
