"""The lengths of a run's learning-rate schedule: it goes by the tokens that a run has consumed."""

import math
from dataclasses import dataclass

from megatron_hybrid.config.phases import run_tokens, sequence_lengths
from megatron_hybrid.config.run import RunConfig


@dataclass(frozen=True)
class Lengths:
    """All in tokens, rounded up to whole multiples of `unit_tokens`.

    Attributes:
        unit_tokens: the largest number that divides every sequence length of the run, so that a
            run has consumed a whole multiple of it at any time; with one sequence length, a sample.
        train_tokens: nominal; the last steps may go a little further.
        warmup_tokens: 0 without a warm-up.
        decay_tokens: where the learning rate is at its lowest, from the start of the schedule.
        wsd_decay_tokens: the final decay of WSD, None without one.
    """

    unit_tokens: int
    train_tokens: int
    warmup_tokens: int
    decay_tokens: int
    wsd_decay_tokens: int | None


def lengths(config: RunConfig, start_tokens: int = 0) -> Lengths:
    """Work out the lengths of a valid config (one of train_iters, _samples, _tokens is set).

    Args:
        start_tokens: consumed before the schedule began.
    """
    optimizer, unit = config.optimizer, math.gcd(*sequence_lengths(config))

    def whole(samples: int | None, tokens: int | None) -> int | None:
        if samples is not None:  # of one length, as the rules see to
            return samples * unit
        return None if tokens is None else -(-tokens // unit) * unit

    train = whole(None, run_tokens(config))
    assert train is not None
    left = max(train - start_tokens, unit)
    decay = whole(optimizer.lr_decay_samples, optimizer.lr_decay_tokens) or left
    warmup = whole(optimizer.lr_warmup_samples, optimizer.lr_warmup_tokens)
    if warmup is None:
        warmup = round((optimizer.lr_warmup_fraction or 0.0) * (decay // unit)) * unit
    wsd_decay = whole(optimizer.lr_wsd_decay_samples, optimizer.lr_wsd_decay_tokens)
    return Lengths(unit, train, warmup, decay, wsd_decay)
