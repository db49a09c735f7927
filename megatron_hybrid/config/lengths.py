"""The lengths of a run and of its learning-rate schedule, all in samples."""

from dataclasses import dataclass

from megatron_hybrid.config.run import RunConfig


@dataclass(frozen=True)
class Lengths:
    """Whole-number lengths; tokens are rounded up to samples, the run to whole global batches."""

    train_iters: int
    train_samples: int
    train_tokens: int
    warmup_samples: int
    decay_samples: int
    wsd_decay_samples: int | None


def _samples(samples: int | None, tokens: int | None, seq_length: int) -> int | None:
    return -(-tokens // seq_length) if tokens is not None else samples


def lengths(config: RunConfig) -> Lengths:
    """Work out the lengths of a valid config (one of train_iters, _samples, _tokens is set)."""
    training, optimizer, seq_length = config.training, config.optimizer, config.data.seq_length
    iters = training.train_iters
    if iters is None:
        asked = _samples(training.train_samples, training.train_tokens, seq_length)
        assert asked is not None
        iters = -(-asked // training.global_batch_size)
    total = iters * training.global_batch_size
    decay = _samples(optimizer.lr_decay_samples, optimizer.lr_decay_tokens, seq_length)
    decay = total if decay is None else decay
    warmup = _samples(optimizer.lr_warmup_samples, optimizer.lr_warmup_tokens, seq_length)
    if warmup is None:
        warmup = round((optimizer.lr_warmup_fraction or 0.0) * decay)
    wsd_decay = _samples(optimizer.lr_wsd_decay_samples, optimizer.lr_wsd_decay_tokens, seq_length)
    return Lengths(iters, total, total * seq_length, warmup, decay, wsd_decay)
