"""Rules of a run's course: its length, its learning rate, its recomputation and its checkpoints."""

from megatron_hybrid.config.lengths import lengths
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.rules.common import Facts, Problems, Rule, at_most_one
from megatron_hybrid.config.run import RunConfig

_LENGTHS = ("training.train_iters", "training.train_samples", "training.train_tokens")
_WSD_DECAY = ("optimizer.lr_wsd_decay_samples", "optimizer.lr_wsd_decay_tokens")
# Fields that say the same thing: where one is typed, it replaces another of a preset.
ALTERNATIVES = (
    _LENGTHS,
    (
        "optimizer.lr_warmup_samples",
        "optimizer.lr_warmup_tokens",
        "optimizer.lr_warmup_fraction",
    ),
    ("optimizer.lr_decay_samples", "optimizer.lr_decay_tokens"),
    _WSD_DECAY,
)


def _values(c: RunConfig, names: tuple[str, ...]) -> dict[str, object]:
    found = {}
    for name in names:
        section, _, leaf = name.partition(".")
        found[name] = getattr(getattr(c, section), leaf)
    return found


def _number_set(c: RunConfig, names: tuple[str, ...]) -> int:
    return sum(value is not None for value in _values(c, names).values())


def alternatives(c: RunConfig, _: Facts) -> Problems:
    """One length for one thing."""
    for names in ALTERNATIVES:
        yield from at_most_one(_values(c, names))


def run_length(c: RunConfig, _: Facts) -> Problems:
    """A run must end."""
    if _number_set(c, _LENGTHS) == 0:
        yield "the length of the run is not set; set one of " + ", ".join(_LENGTHS)


def learning_rate(c: RunConfig, _: Facts) -> Problems:
    """The learning rate decays downwards."""
    o = c.optimizer
    if o.min_lr > o.lr:
        yield (
            f"optimizer.min_lr={o.min_lr} must be at most optimizer.lr={o.lr}; allowed: 0 to {o.lr}"
        )


def wsd(c: RunConfig, _: Facts) -> Problems:
    """The final decay belongs to WSD, and WSD needs one."""
    style, given = c.optimizer.lr_decay_style, _values(c, _WSD_DECAY)
    if style == "WSD":
        if _number_set(c, _WSD_DECAY) == 0:
            yield "optimizer.lr_decay_style=WSD needs one of " + ", ".join(_WSD_DECAY)
        return
    for name, value in given.items():
        if value is not None:
            yield f"{name}={value} needs optimizer.lr_decay_style=WSD; it is {style}"


def schedule_fits(c: RunConfig, _: Facts) -> Problems:
    """Warm-up and final decay fit within the schedule."""
    if _number_set(c, _LENGTHS) != 1 or any(_number_set(c, names) > 1 for names in ALTERNATIVES):
        return
    found, o = lengths(c), c.optimizer
    source = "the run" if o.lr_decay_samples is o.lr_decay_tokens is None else "its decay"
    whole = f"the schedule, {found.decay_samples} samples ({source})"
    if found.warmup_samples >= found.decay_samples:
        yield (
            f"the warm-up, {found.warmup_samples} samples "
            f"({_shown(c, ALTERNATIVES[1])}), must be shorter than {whole}; "
            f"allowed: fewer than {found.decay_samples} samples"
        )
    elif found.wsd_decay_samples and o.lr_decay_style == "WSD":
        room = found.decay_samples - found.warmup_samples
        if found.wsd_decay_samples > room:
            yield (
                f"the final decay, {found.wsd_decay_samples} samples ({_shown(c, _WSD_DECAY)}), "
                f"must fit into {whole} after a warm-up of {found.warmup_samples}; "
                f"allowed: up to {room} samples"
            )


def _shown(c: RunConfig, names: tuple[str, ...]) -> str:
    return ", ".join(f"{name}={v}" for name, v in _values(c, names).items() if v is not None)


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
        stages = c.parallel.pipeline_model_parallel_size
        layers = parse_pattern(c.model.hybrid_layer_pattern).num_layers
        if t.recompute_num_layers > -(-layers // stages):
            yield (
                f"training.recompute_num_layers={t.recompute_num_layers} must be at most the "
                f"layers of a pipeline stage; allowed: 1 to {-(-layers // stages)}"
            )


def split(c: RunConfig, _: Facts) -> Problems:
    """The split is three shares; what is evaluated must have one."""
    text = c.data.split
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield (
            f"data.split={text!r} must be three shares of at least 0, train,validation,test, "
            "such as 969,30,1"
        )
    elif shares[0] == 0:
        yield f"data.split={text!r} leaves nothing to train on; the first share must be above 0"
    elif shares[1] == 0 and c.training.eval_interval is not None:
        yield (
            f"training.eval_interval={c.training.eval_interval} needs documents to evaluate on, "
            f"but the second share of data.split={text!r} is 0; allowed: null"
        )


def finetune(c: RunConfig, _: Facts) -> Problems:
    """Fine-tuning starts from weights."""
    if c.checkpoint.finetune and c.checkpoint.load is None:
        yield "checkpoint.finetune=true needs checkpoint.load; it is null"


RUN: tuple[Rule, ...] = (
    alternatives,
    run_length,
    learning_rate,
    wsd,
    schedule_fits,
    recompute,
    split,
    finetune,
)
