"""What a config says about data over the run: its sources, its phases and its batch sizes.

One reading for both spellings, `data.sources` with `data.phases` and Megatron-LM's `--data-path`.
All boundaries are tokens of the run, exact and nominal: the steps that meet them are laid out by
`megatron_hybrid.data.batches`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from megatron_hybrid.config.data import PhaseConfig, SourceConfig
from megatron_hybrid.config.run import RunConfig

ONLY_PHASE = "all"


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with one blend.

    Attributes:
        name: as in the config; "all" where the config has no phases.
        start_tokens, end_tokens: nominal, tokens of the run; one phase ends where the next starts.
        weights: by source, above 0, summing to 1; empty with made-up tokens.
        seq_length: tokens in a sample.
    """

    name: str
    start_tokens: int
    end_tokens: int
    weights: dict[str, float]
    seq_length: int


def sources(config: RunConfig) -> dict[str, SourceConfig]:
    """The sources of a valid config by name; a prefix of `data.data_path` is its own name."""
    if config.data.data_path:
        return {prefix: SourceConfig(path=(prefix,)) for _, prefix in config.data.data_path}
    return dict(config.data.sources)


def phases(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a valid config in the order of the run, from 0 to `run_tokens(config)`."""
    total, data = run_tokens(config), config.data
    if not data.phases:
        blend = normalised({prefix: weight for weight, prefix in data.data_path})
        return (Phase(ONLY_PHASE, 0, total, blend, data.seq_length),)
    starts = [start_of(phase, total) or 0 for phase in data.phases]
    return tuple(
        Phase(
            phase.name, start, end, normalised(phase.weights), phase.seq_length or data.seq_length
        )
        for phase, start, end in zip(data.phases, starts, [*starts[1:], total], strict=True)
    )


def start_of(phase: PhaseConfig, run_tokens: int) -> int | None:
    """Tokens of the run at which a phase begins, rounded down; None: it does not say."""
    if phase.start_tokens is not None:
        return phase.start_tokens
    if phase.start_fraction is not None:
        return math.floor(exact(phase.start_fraction) * run_tokens)
    return None if phase.last_tokens is None else run_tokens - phase.last_tokens


def exact(number: float) -> Fraction:
    """The number that was written: 0.6 is 3/5, not the float next to it."""
    return Fraction(str(number))


# A few of them may have a sum beyond the largest float.
LARGE_WEIGHT = 1e300


def normalised(weights: dict[str, float]) -> dict[str, float]:
    """Weights above 0, divided by their sum."""
    if (largest := max(weights.values(), default=0.0)) > LARGE_WEIGHT:
        weights = {name: weight / largest for name, weight in weights.items()}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def batch_sizes(config: RunConfig) -> tuple[tuple[int, int], ...]:
    """Pairs of the consumed tokens from which, and the global batch size; the first from 0."""
    training = config.training
    return ((0, training.global_batch_size), *training.batch_size_schedule)


def sequence_lengths(config: RunConfig) -> tuple[int, ...]:
    """The sequence length of each phase, in their order."""
    length = config.data.seq_length
    return tuple(phase.seq_length or length for phase in config.data.phases) or (length,)


def sequence_length_fields(config: RunConfig) -> dict[str, int]:
    """Those of training and of evaluations by the fields that say so, each field once."""
    found: dict[str, int] = {}
    for number, phase in enumerate(config.data.phases):
        if phase.seq_length is not None:
            found[f"data.phases[{number}].seq_length"] = phase.seq_length
    if len(found) < max(len(config.data.phases), 1) or config.training.eval_interval is not None:
        found["data.seq_length"] = config.data.seq_length
    return found


def run_tokens(config: RunConfig) -> int:
    """The length of a valid config's run in tokens, as asked: steps may take it a little further.

    `train_iters` and `train_samples` count samples of one length, as the rules see to.
    """
    training, seq_length = config.training, sequence_lengths(config)[0]
    if training.train_tokens is not None:
        return training.train_tokens
    if training.train_samples is not None:
        return training.train_samples * seq_length
    assert training.train_iters is not None
    return training.train_iters * training.global_batch_size * seq_length
