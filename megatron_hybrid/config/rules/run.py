"""Rules of a run's course: its length, its learning rate, its recomputation and its checkpoints."""

from megatron_hybrid.bounds import MOST_TOKENS
from megatron_hybrid.config.describe import fields, shown
from megatron_hybrid.config.layers import layers_of
from megatron_hybrid.config.lengths import lengths
from megatron_hybrid.config.pattern import ATTENTION, MLP, MOE, parse_pattern
from megatron_hybrid.config.phases import batch_sizes, run_tokens, sequence_lengths
from megatron_hybrid.config.rules.common import (
    LENGTHS,
    Facts,
    Problems,
    Rule,
    at_most_one,
    number_set,
    values,
)
from megatron_hybrid.config.run import RunConfig

_WSD_DECAY = ("optimizer.lr_wsd_decay_samples", "optimizer.lr_wsd_decay_tokens")
# Fields that say the same thing: where one is typed, it replaces another of a preset.
ALTERNATIVES = (
    LENGTHS,
    (
        "optimizer.lr_warmup_samples",
        "optimizer.lr_warmup_tokens",
        "optimizer.lr_warmup_fraction",
    ),
    ("optimizer.lr_decay_samples", "optimizer.lr_decay_tokens"),
    _WSD_DECAY,
)
# By field, the others that it stands in place of.
REPLACED: dict[str, tuple[str, ...]] = {name: names for names in ALTERNATIVES for name in names} | {
    "data.data_path": ("data.sources", "data.phases"),
    "data.sources": ("data.data_path",),
    "data.phases": ("data.data_path",),
}


def alternatives(c: RunConfig, _: Facts) -> Problems:
    """One length for one thing."""
    for names in ALTERNATIVES:
        yield from at_most_one(values(c, names))


def run_length(c: RunConfig, _: Facts) -> Problems:
    """A run must end."""
    if number_set(c, LENGTHS) == 0:
        yield "the length of the run is not set; set one of " + ", ".join(LENGTHS)
    elif number_set(c, LENGTHS) == 1 and run_tokens(c) > MOST_TOKENS:
        yield (
            f"{_shown(c, LENGTHS)} makes a run of {run_tokens(c)} tokens; allowed: up to "
            f"{MOST_TOKENS} tokens"
        )
    longest = max(sequence_lengths(c))
    for _from_tokens, size in batch_sizes(c):
        if size * longest > MOST_TOKENS:
            yield (
                f"a global batch of {size} samples of {longest} tokens is {size * longest} tokens; "
                f"allowed: up to {MOST_TOKENS} tokens"
            )


def learning_rate(c: RunConfig, _: Facts) -> Problems:
    """The learning rate decays downwards."""
    o = c.optimizer
    if o.min_lr > o.lr:
        yield (
            f"optimizer.min_lr={o.min_lr} must be at most optimizer.lr={o.lr}; allowed: 0 to {o.lr}"
        )


def wsd(c: RunConfig, _: Facts) -> Problems:
    """The final decay belongs to WSD, and WSD needs one."""
    style, given = c.optimizer.lr_decay_style, values(c, _WSD_DECAY)
    if style == "WSD":
        if number_set(c, _WSD_DECAY) == 0:
            yield "optimizer.lr_decay_style=WSD needs one of " + ", ".join(_WSD_DECAY)
        return
    for name, value in given.items():
        if value is not None:
            yield f"{name}={value} needs optimizer.lr_decay_style=WSD; it is {style}"


def schedule_fits(c: RunConfig, facts: Facts) -> Problems:
    """Warm-up and final decay fit within the schedule."""
    if number_set(c, LENGTHS) != 1 or any(number_set(c, names) > 1 for names in ALTERNATIVES):
        return
    start, o = facts.schedule_start_tokens, c.optimizer
    found = lengths(c, start)
    source = "the run" if o.lr_decay_samples is o.lr_decay_tokens is None else "its decay"
    if start:
        source += f", from token {start} on"
    whole = f"the schedule, {found.decay_tokens} tokens ({source})"
    if found.warmup_tokens >= found.decay_tokens:
        yield (
            f"the warm-up, {found.warmup_tokens} tokens "
            f"({_shown(c, ALTERNATIVES[1])}), must be shorter than {whole}; "
            f"allowed: fewer than {found.decay_tokens} tokens"
        )
    elif found.wsd_decay_tokens and o.lr_decay_style == "WSD":
        room = found.decay_tokens - found.warmup_tokens
        if found.wsd_decay_tokens > room:
            yield (
                f"the final decay, {found.wsd_decay_tokens} tokens ({_shown(c, _WSD_DECAY)}), "
                f"must fit into {whole} after a warm-up of {found.warmup_tokens}; "
                f"allowed: up to {room} tokens"
            )


def _shown(c: RunConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={v}" for name, v in values(c, names).items() if v is not None)


def recompute(c: RunConfig, _: Facts) -> Problems:
    """megatron-core's full recomputation needs a method and a count; the others take neither."""
    t = c.training
    extra = {
        "training.recompute_method": t.recompute_method,
        "training.recompute_num_layers": t.recompute_num_layers,
    }
    for name, value in extra.items():
        if t.recompute_granularity == "full" and value is None:
            kinds = "uniform, block" if name.endswith("method") else "1 and more"
            yield f"training.recompute_granularity=full needs {name}; allowed: {kinds}"
        if t.recompute_granularity != "full" and value is not None:
            granularity = t.recompute_granularity or "null"
            yield f"{name}={value} needs training.recompute_granularity=full; it is {granularity}"
    if t.recompute_granularity == "full" and t.recompute_num_layers is not None:
        pattern, stages = parse_pattern(c.model.hybrid_layer_pattern), c.parallel
        most = pattern.most_layers(stages.pipeline_model_parallel_size)
        if t.recompute_num_layers > most:
            yield (
                f"training.recompute_num_layers={t.recompute_num_layers} must be at most the "
                f"layers of a pipeline stage; allowed: 1 to {most}"
            )


def recomputed_modules(c: RunConfig, _: Facts) -> Problems:
    """What is named is in some layer, and once; what is not named here has no layer of ours, or is
    computed again by the engine with an extension that it compiles while the run goes.
    """
    t, pattern = c.training, parse_pattern(c.model.hybrid_layer_pattern)
    if not t.recompute_modules:
        return
    listed = f"training.recompute_modules=[{', '.join(t.recompute_modules)}]"
    if t.recompute_granularity != "selective":
        granularity = t.recompute_granularity or "null"
        yield f"{listed} needs training.recompute_granularity=selective; it is {granularity}"
    there = {
        "core_attn": pattern.has(ATTENTION), "mlp": pattern.has(MLP), "moe": pattern.has(MOE),
        "shared_experts": any(
            layer.model.moe_shared_expert_intermediate_size is not None
            for layer in layers_of(c.model, MOE)
        ),
    }  # fmt: skip
    if missing := [name for name in t.recompute_modules if not there[name]]:
        allowed = ", ".join(name for name, has in there.items() if has) or "[]"
        yield f"{listed}: no layer of this model has {', '.join(missing)}; allowed: {allowed}"
    if {"moe", "shared_experts"} <= set(t.recompute_modules):
        yield f"{listed}: moe has shared_experts in it; allowed: one of them"
    if "shared_experts" in t.recompute_modules and c.gpu.moe_shared_expert_overlap:
        yield (
            f"{listed} with gpu.moe_shared_expert_overlap=true is not supported: shared experts "
            "that compute beside transfers are kept; allowed: either of them"
        )


def beginning(c: RunConfig, _: Facts) -> Problems:
    """A run starts from one checkpoint, which what is said of the start needs."""
    load, dense = c.checkpoint.load, getattr(c.upcycling, "from")
    if load is not None and dense is not None:
        yield (
            f"checkpoint.load={load}, upcycling.from={dense}: a run starts from one of them; "
            "allowed: the other null"
        )
    if load is None and dense is None:
        for name in ("checkpoint.finetune", "optimizer.restart_schedule"):
            if values(c, [name])[name]:
                yield f"{name}=true needs checkpoint.load or upcycling.from; both are null"


def upcycling(c: RunConfig, _: Facts) -> Problems:
    """Experts are made of a dense checkpoint; the other fields say how."""
    u, pattern = c.upcycling, c.model.hybrid_layer_pattern
    if getattr(u, "from") is None:
        for path, field in fields().items():
            if path.startswith("upcycling.") and values(c, [path])[path] != field.default:
                yield f"{path}={shown(values(c, [path])[path])} needs upcycling.from; it is null"
    elif MOE not in pattern:
        yield (
            f"upcycling.from={getattr(u, 'from')} needs an 'E' layer in "
            f"model.hybrid_layer_pattern={pattern!r} for each '-' layer that is to become experts"
        )


def profiled_steps(c: RunConfig, facts: Facts) -> Problems:
    """At least one step on a rank that there is."""
    training = c.training
    start, end = training.profile_step_start, training.profile_step_end
    if training.profile and end <= start:
        yield (
            f"training.profile_step_end={end} must be more than "
            f"training.profile_step_start={start}; allowed: {start + 1}, {start + 2}, ..."
        )
    if facts.world_size is None:
        return
    beyond = [rank for rank in training.profile_ranks if rank >= facts.world_size]
    if training.profile and beyond:
        yield (
            f"training.profile_ranks names {beyond[0]}, but there are {facts.world_size} ranks; "
            f"allowed: 0 to {facts.world_size - 1}"
        )


def eval_tasks(c: RunConfig, _: Facts) -> Problems:
    """Who answers tasks generates text from left to right, on ranks that divide the model alone."""
    t, asked = c.training, f"training.eval_tasks=[{', '.join(c.training.eval_tasks)}]"
    if not t.eval_tasks:
        return
    if t.eval_interval is None:
        yield f"{asked} needs training.eval_interval, which is null; set it, or ask no tasks"
    if c.model.attn_mask_type != "causal":
        yield f"{asked} needs model.attn_mask_type=causal; it is {c.model.attn_mask_type}"
    if c.parallel.context_parallel_size > 1:
        yield (
            f"{asked} is for parallel.context_parallel_size=1; it is "
            f"{c.parallel.context_parallel_size}. `megatron-hybrid evaluate --tasks` asks its "
            "checkpoints"
        )
    if c.precision.fp8_param_gather:
        yield (
            f"{asked} needs weights in bf16, and precision.fp8_param_gather=true keeps them in "
            "float8. `megatron-hybrid evaluate --tasks` asks its checkpoints"
        )
    if c.data.tokenizer_type == "null":
        yield f"{asked} needs a tokenizer of texts; data.tokenizer_type=null has numbers alone"


RUN: tuple[Rule, ...] = (
    alternatives,
    run_length,
    learning_rate,
    wsd,
    schedule_fits,
    recompute,
    recomputed_modules,
    beginning,
    upcycling,
    profiled_steps,
    eval_tasks,
)
