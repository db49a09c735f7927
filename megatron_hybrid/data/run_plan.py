"""From a run's config to its sources, its plan, and the plan of its evaluations."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from megatron_hybrid.config.phases import Phase, batch_sizes, exact, phases, sources
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.continue_plan import continue_plan
from megatron_hybrid.data.conversations import conversation_sources
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.layout import default_block_tokens, make_plan
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.source import Source, open_sources
from megatron_hybrid.data.stream import PlannedSource

logger = logging.getLogger(__name__)

MANY_EPOCHS = 4  # more passes teach little; beyond this they are warned of
_TRAIN, _VALID = 0, 1  # shares of a split


def open_run_sources(
    config: RunConfig,
    fingerprint: str | None,
    eod: int | None = None,
    *,
    conversations: bool = False,
) -> dict[str, Source]:
    """Open the sources of a run, all that its config names.

    Args:
        config: of the run.
        fingerprint: `Tokenizer.fingerprint`; None: any.
        eod: `Tokenizer.eod`; None: any.
        conversations: samples are rows of whole conversations, not windows of text.

    Raises:
        DataError: with every file that cannot be used.
    """
    paths = {name: source.path for name, source in sources(config).items()}
    opened = open_sources(paths, fingerprint, eod)
    if conversations:
        return {**conversation_sources(opened, config.data.seq_length)}
    return opened


def training_plan(
    config: RunConfig,
    opened: Mapping[str, Source],
    saved: Plan | None = None,
    consumed_samples: int = 0,
) -> Plan:
    """The plan of a run from its beginning, or of one that goes on.

    Args:
        config: of the run.
        opened: the sources, by name.
        saved: the plan so far, from the checkpoint that the run goes on from.
        consumed_samples: of that checkpoint.

    Raises:
        DataError: the config asks for what the sources do not have, or changes what was read; see
            `make_plan` and `continue_plan`.
    """
    blend, sizes, seed = phases(config), batch_sizes(config), config.training.seed
    block_tokens = config.data.block_tokens or default_block_tokens(
        [phase.seq_length for phase in blend]
    )
    planned = []
    for name, source in sources(config).items():
        split = source.split or config.data.split
        region = _region(opened[name], split, _TRAIN)
        planned.append(_planned(opened[name], region, block_tokens, source.fraction))
    if saved is None:
        return make_plan(blend, planned, sizes, seed)
    planned = [_known(saved, opened[source.name], source) for source in planned]
    if config.data.block_tokens is None:
        planned = _with_blocks_of(saved, consumed_samples, planned)
    from_data_path = bool(config.data.data_path)
    return continue_plan(saved, consumed_samples, blend, planned, sizes, seed, from_data_path)


def check_epochs(config: RunConfig, plan: Plan) -> None:
    """Hold the epochs of every source over the whole run against the caps; without a cap, more
    than 4 are a warning in the log.

    Raises:
        DataError: with each source above its cap, the phase that crosses it, and the shortfall.
    """
    _warn_of_nothing(plan)
    problems = []
    for number, use in enumerate(plan.consumed(plan.samples)):
        own = sources(config)[use.name].max_epochs
        cap = config.data.max_epochs if own is None else own
        field = "data.max_epochs" if own is None else f"data.sources.{use.name}.max_epochs"
        if cap is not None:
            problems.append(_cap_problem(plan, number, field, cap))
        elif use.epochs > MANY_EPOCHS:
            logger.warning(
                "the run reads source %s %.2f times; data.max_epochs would set a limit",
                *(use.name, use.epochs),
            )
    if any(problems):
        raise DataError("\n".join(filter(None, problems)))


def _warn_of_nothing(plan: Plan) -> None:
    """A source that a phase weighs, but of which it reads no sample."""
    for number, phase in enumerate(plan.phases):
        stretches = [stretch for stretch in plan.stretches if stretch.phase == number]
        samples = sum(stretch.end_sample - stretch.first_sample for stretch in stretches)
        for place, source in enumerate(plan.sources):
            weight = phase.weights.get(source.name, 0.0)
            if weight and not sum(stretch.counts[place] for stretch in stretches):
                logger.warning(
                    "phase %s reads no sample of source %s: its weight is %.3g of the blend, and "
                    "of %d samples one is %.3g",
                    *(phase.name, source.name, weight, samples, 1 / max(samples, 1)),
                )


def validation_plan(config: RunConfig, opened: Mapping[str, Source], plan: Plan) -> Plan:
    """The samples of every evaluation: `eval_iters` global batches of `data.seq_length` tokens from
    what is held out of each source, in proportion to the tokens of the training plan.

    Raises:
        DataError: with each source of the training plan that has less than a sample held out.
    """
    valid = _validation_plan(config, opened, plan)
    for use in valid.consumed(valid.samples):
        if use.epochs > 1:
            logger.warning(
                "every evaluation reads what is held out of source %s %.2f times",
                *(use.name, use.epochs),
            )
    return valid


def evaluated(config: RunConfig, opened: Mapping[str, Source], plan: Plan) -> list[str]:
    """What an evaluation is of: a part of a sentence for each source, or why there is none."""
    if missing := [name for name in sources(config) if name not in opened]:
        return [f"samples of {', '.join(missing)}"]
    try:
        valid = _validation_plan(config, opened, plan)
    except DataError as error:
        return [str(error)]
    uses = zip(valid.sources, valid.consumed(valid.samples), strict=True)
    return [
        f"{use.samples} samples of {config.data.seq_length} tokens from tokens {source.begin} to "
        f"{source.end} of {source.name}"
        for source, use in uses
        if use.samples
    ]


def _validation_plan(config: RunConfig, opened: Mapping[str, Source], plan: Plan) -> Plan:
    training, seq_length = config.training, config.data.seq_length
    weights = {use.name: use.tokens / plan.tokens for use in plan.consumed(plan.samples)}
    weights = {name: weight for name, weight in weights.items() if weight}
    held_out = []
    for name, source in sources(config).items():
        region = _region(opened[name], source.split or config.data.split, _VALID)
        held_out.append(_planned(opened[name], region, seq_length))
    samples = training.eval_iters * training.global_batch_size
    phase = Phase("validation", 0, samples * seq_length, weights, seq_length)
    try:
        return make_plan([phase], held_out, [(0, samples)], training.seed)
    except DataError as error:
        raise DataError(f"training.eval_interval={training.eval_interval}: {error}") from error


def _region(source: Source, split: str, part: int) -> tuple[int, int]:
    """The tokens of one share of a split, a valid one such as "969,30,1"."""
    shares = [exact(float(share)) for share in split.split(",")]
    begin, end = (Fraction(sum(shares[:count])) / sum(shares) for count in (part, part + 1))
    return source.share(begin, end)


def _planned(
    source: Source, region: tuple[int, int], block_tokens: int, fraction: float = 1.0
) -> PlannedSource:
    shards = tuple(shard.digest for shard in source.shards)
    return PlannedSource(source.name, shards, source.tokens, *region, block_tokens, fraction)


def _known(saved: Plan, source: Source, planned: PlannedSource) -> PlannedSource:
    """A source with the digests that the plan of an older version has of the same files."""
    older = tuple(shard.older_digest for shard in source.shards)
    is_older = any(each.name == source.name and each.shards == older for each in saved.sources)
    return replace(planned, shards=older) if is_older else planned


def _with_blocks_of(
    saved: Plan, consumed_samples: int, planned: list[PlannedSource]
) -> list[PlannedSource]:
    """Sources that have been read keep their blocks where the config leaves them to us."""
    uses = zip(saved.sources, saved.consumed(consumed_samples), strict=True)
    blocks = {source.name: source.block_tokens for source, use in uses if use.samples}
    return [
        replace(source, block_tokens=blocks.get(source.name, source.block_tokens))
        for source in planned
    ]


def _cap_problem(plan: Plan, number: int, field: str, cap: float) -> str | None:
    """The sentence on a source, by its number in the plan, that is read more than `cap` times."""
    source, limit = plan.sources[number], exact(cap)
    last = plan.positions(plan.samples)[number]
    epochs = source.epochs(last)
    if last is None or epochs <= limit:
        return None
    crossing = next(
        stretch
        for stretch in plan.stretches
        if source.epochs(plan.positions(stretch.end_sample)[number]) > limit
    )
    epoch_tokens = source.epoch_windows(last.seq_length) * last.seq_length
    return (
        f"{field}={cap:g}: the run reads source {source.name} {float(epochs):.4g} times and passes "
        f"the cap in phase {plan.phases[crossing.phase].name}; of {epoch_tokens} tokens an epoch, "
        f"it lacks {math.ceil((epochs - limit) * epoch_tokens)}; lower its weight, shorten the run "
        "or raise the cap"
    )
