"""Rules of when: where phases and batch sizes begin, and in what a run is measured."""

from collections.abc import Iterator

from megatron_hybrid.config.data import PhaseConfig
from megatron_hybrid.config.partial import UnreadableError
from megatron_hybrid.config.phases import batch_sizes, run_tokens, sequence_lengths, start_of
from megatron_hybrid.config.rules.common import (
    LENGTHS,
    Facts,
    Problems,
    Rule,
    at_most_one,
    each,
    number_set,
    values,
)
from megatron_hybrid.config.run import RunConfig

_STARTS = ("start_tokens", "start_fraction", "last_tokens")
# As REPLACED, for the fields of one phase.
REPLACED_INSIDE: dict[str | int, tuple[str, ...]] = dict.fromkeys(_STARTS, _STARTS)
_IN_SAMPLES = (
    "training.train_iters",
    "training.train_samples",
    "optimizer.lr_warmup_samples",
    "optimizer.lr_decay_samples",
    "optimizer.lr_wsd_decay_samples",
)


def _given_starts(phase: PhaseConfig) -> dict[str, object]:
    found = {name: getattr(phase, name) for name in _STARTS}
    return {name: value for name, value in found.items() if value is not None}


def starts_given(c: RunConfig, _: Facts) -> Problems:
    """The first phase begins the run; each later one says once where it begins."""

    def check(place: str, phase: PhaseConfig) -> Problems:
        given = {f"{place}.{name}": value for name, value in _given_starts(phase).items()}
        if place == "data.phases[0]":
            for name, value in given.items():
                yield f"{name}={value}: the first phase begins with the run; allowed: null"
        elif not given:
            yield f"{place} does not say where it begins; set one of " + ", ".join(
                f"{place}.{name}" for name in _STARTS
            )
        else:
            yield from at_most_one(given)

    yield from each("data.phases", c.data.phases, check)


def _known_starts(c: RunConfig, total: int) -> Iterator[tuple[int, str, int]]:
    """For phases that say once where they begin: number, how it is said, and the tokens."""
    for number, phase in enumerate(c.data.phases):
        try:
            given = _given_starts(phase)
            start = start_of(phase, total)
        except UnreadableError:
            continue
        if number and len(given) == 1 and start is not None:
            [(name, value)] = given.items()
            yield number, f"data.phases[{number}].{name}={value}", start


def starts_ascend(c: RunConfig, _: Facts) -> Problems:
    """Phases follow each other within the run, and each has room for a global batch."""
    if not _length_is_known(c) or not c.data.phases:
        return
    total, begins, previous = run_tokens(c), "data.phases[0]", 0
    for number, said, start in _known_starts(c, total):
        if start >= total or start < 0:
            yield (f"{said} must lie within the run's {total} tokens; allowed: 1 to {total - 1}")
            continue
        if start <= previous:
            yield (
                f"{said} begins at {start} tokens of the run; it must begin after {begins}, which "
                f"begins at {previous}"
            )
        else:
            yield from _room(c, number - 1, previous, start)
        begins, previous = f"data.phases[{number}]", start
    if len(c.data.phases) > 1 and previous:
        yield from _room(c, len(c.data.phases) - 1, previous, total)


def _room(c: RunConfig, number: int, start: int, end: int) -> Problems:
    """The problem of a phase that ends before its first global batch does."""
    size = [samples for from_tokens, samples in batch_sizes(c) if from_tokens <= start][-1]
    seq_length = sequence_lengths(c)[number]
    if end - start < size * seq_length:
        yield (
            f"data.phases[{number}] has {end - start} tokens, from {start} to {end}; it must hold "
            f"a global batch, {size} samples of {seq_length} tokens, {size * seq_length}"
        )


def _length_is_known(c: RunConfig) -> bool:
    """Whether the run's tokens are: one length is set, and no sample differs from another."""
    same = len(set(sequence_lengths(c))) == 1 or c.training.train_tokens is not None
    return same and number_set(c, LENGTHS) == 1


def batch_size_schedule(c: RunConfig, _: Facts) -> Problems:
    """Batch sizes follow each other within the run."""
    name, schedule = "training.batch_size_schedule", c.training.batch_size_schedule
    previous = 0
    for number, (from_tokens, _size) in enumerate(schedule):
        if from_tokens <= previous:
            yield (
                f"{name}[{number}] begins at {from_tokens} tokens; it must begin after "
                f"{name}[{number - 1}], which begins at {previous}"
            )
        previous = from_tokens
    if schedule and _length_is_known(c) and previous >= run_tokens(c):
        yield (
            f"{name} has a size from {previous} tokens on; it must begin within the run's "
            f"{run_tokens(c)} tokens"
        )


def lengths_in_tokens(c: RunConfig, _: Facts) -> Problems:
    """Where samples or steps differ in size, they are no measure."""
    seq_lengths = sorted(set(sequence_lengths(c)))
    if len(seq_lengths) > 1:
        why = f"the phases have samples of {' and '.join(map(str, seq_lengths))} tokens"
        unfit: tuple[str, ...] = _IN_SAMPLES
    elif c.training.batch_size_schedule:
        why = "training.batch_size_schedule changes the size of a step"
        unfit = _IN_SAMPLES[:2]
    else:
        return
    for name, value in values(c, unfit).items():
        if value is not None:
            instead = f"{name.rpartition('_')[0]}_tokens"
            yield f"{name}={value} is no measure where {why}; allowed: {instead}"


PHASES: tuple[Rule, ...] = (
    starts_given,
    starts_ascend,
    batch_size_schedule,
    lengths_in_tokens,
)
