"""Rules of multi-token prediction (`model.mtp_num_layers`)."""

from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.pattern import GDN, PARALLEL, SEPARATOR, parse_pattern, pattern_problems
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.rules.common import Facts, Problems, Rule
from megatron_hybrid.config.run import RunConfig

_NUM, _LAYERS = "mtp_num_layers", "mtp_hybrid_override_pattern"


def prediction_layers(c: RunConfig, _: Facts) -> Problems:
    """The modules have layers, of kinds whose sizes the model says."""
    m = c.model
    number, text, factor = (
        m.mtp_num_layers,
        m.mtp_hybrid_override_pattern,
        "mtp_loss_scaling_factor",
    )
    if number is None:
        usual = fields()[f"model.{factor}"].default
        if text is not None:
            yield f"model.{_LAYERS}={text!r} needs model.{_NUM}, which is null; allowed: null"
        if m.mtp_loss_scaling_factor != usual:
            yield (
                f"model.{factor}={shown(m.mtp_loss_scaling_factor)} needs model.{_NUM}, which is "
                f"null; allowed: {shown(usual)}"
            )
        return
    if text is None:
        yield (
            f"model.{_LAYERS} is not set, and model.{_NUM}={number}; it must be a pattern "
            "such as *E"
        )
        return
    found = pattern_problems(text)
    if SEPARATOR in text and not found:
        found = [f"it has {SEPARATOR!r}: all modules are on the last pipeline stage"]
    yield from (f"model.{_LAYERS}={text!r}: {problem}" for problem in found)
    if found:
        return
    kinds = parse_pattern(m.hybrid_layer_pattern).layers
    if others := sorted(set(text) - set(kinds)):
        yield (
            f"model.{_LAYERS}={text!r} has {', '.join(map(repr, others))}, of which "
            f"model.hybrid_layer_pattern={m.hybrid_layer_pattern!r} has no layers; allowed: "
            f"{', '.join(sorted(set(kinds)))}"
        )
    if len(text) > len(kinds):
        yield (
            f"model.{_LAYERS}={text!r} must have at most the {len(kinds)} layers of "
            f"model.hybrid_layer_pattern={m.hybrid_layer_pattern!r}"
        )


def prediction_elsewhere(c: RunConfig, _: Facts) -> Problems:
    """What the modules are not combined with."""
    m = c.model
    if m.mtp_num_layers is None:
        return
    name, pp = f"model.{_NUM}={m.mtp_num_layers}", c.parallel.pipeline_model_parallel_size
    recompute, training = c.training.recompute_granularity, c.training
    if m.layers:
        yield f"{name} with model.layers is not supported: modules have the model's sizes"
    for kind in (PARALLEL, GDN):
        if kind in m.hybrid_layer_pattern:
            yield f"{name} with {kind!r} layers in model.hybrid_layer_pattern is not supported"
    if m.num_meta_tokens:
        yield (
            f"{name} with model.num_meta_tokens={m.num_meta_tokens} is not supported: "
            "modules would predict what follows them; allowed: 0"
        )
    if m.attn_mask_type != "causal":
        yield f"{name} needs model.attn_mask_type=causal; it is {m.attn_mask_type}"
    if pp > 1 and not m.untie_embeddings_and_output_weights:
        yield (
            f"{name} with model.untie_embeddings_and_output_weights=false needs "
            f"parallel.pipeline_model_parallel_size=1; it is {pp}: the last stage would have two "
            "copies of one matrix"
        )
    if c.precision.recipe in FLOAT8_RECIPES:
        yield (
            f"{name} with precision.recipe={c.precision.recipe} is not supported; allowed: bf16, "
            "fp32"
        )
    if c.gpu.cuda_graph_impl != "none":
        yield (
            f"{name} with gpu.cuda_graph_impl={c.gpu.cuda_graph_impl} is not supported; allowed: "
            "none"
        )
    if c.upcycling.source is not None:
        yield f"{name} with upcycling.from is not supported; allowed: null"
    uniform = training.recompute_method == "uniform" and training.recompute_num_layers == 1
    if recompute == "full" and not uniform:
        yield (
            f"{name} with training.recompute_granularity=full needs "
            "training.recompute_method=uniform and training.recompute_num_layers=1; they are "
            f"{training.recompute_method} and {training.recompute_num_layers}"
        )


PREDICTION: tuple[Rule, ...] = (prediction_layers, prediction_elsewhere)
