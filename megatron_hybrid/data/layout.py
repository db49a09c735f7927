"""Laying out a plan: declared phases to stretches of whole global batches with exact counts."""

import math
from collections.abc import Sequence

from megatron_hybrid.config.phases import Phase
from megatron_hybrid.data.batches import size_at, whole_batches
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.plan import Plan, Stretch
from megatron_hybrid.data.proportions import MAX_SLOTS, share_out
from megatron_hybrid.data.stream import PlannedSource

_MOST_WINDOWS_IN_A_BLOCK = 16  # of the longest sequence


def make_plan(
    phases: Sequence[Phase],
    sources: Sequence[PlannedSource],
    batch_sizes: Sequence[tuple[int, int]],
    seed: int,
) -> Plan:
    """Lay out a run from its beginning.

    Args:
        phases: in the order of the run, the first from token 0.
        sources: those that the phases weigh, and any others.
        batch_sizes: `(from_tokens, samples)`, as `megatron_hybrid.data.batches.Steps` takes them.
        seed: of the order of every source.

    Raises:
        DataError: a phase holds no global batch, or a source it draws from no window; all of them.
    """
    check_blocks(phases, sources)
    stretches = lay_out(phases, sources, batch_sizes)
    return Plan(seed, tuple(sources), tuple(phases), stretches)


def default_block_tokens(seq_lengths: Sequence[int]) -> int:
    """The tokens of a block that all sequence lengths fill, where it is not far too long."""
    longest = max(seq_lengths)
    return min(math.lcm(*seq_lengths), _MOST_WINDOWS_IN_A_BLOCK * longest)


def lay_out(
    phases: Sequence[Phase],
    sources: Sequence[PlannedSource],
    batch_sizes: Sequence[tuple[int, int]],
    after: Sequence[Stretch] = (),
) -> tuple[Stretch, ...]:
    """Stretches for all phases, or for what is left of them after others, which come first.

    A phase has the whole global batches that fit before its nominal end, the last one as many as
    reach it.

    Raises:
        DataError: phases that hold no global batch.
    """
    stretches = list(after)
    sample = stretches[-1].end_sample if stretches else 0
    tokens = sum(stretch.tokens for stretch in stretches)
    begun = stretches[-1].phase if stretches else -1
    problems = []
    for number, phase in enumerate(phases):
        if number < begun:
            continue
        is_last = number == len(phases) - 1
        samples = whole_batches(
            batch_sizes, tokens, phase.end_tokens, phase.seq_length, reach=is_last
        )
        if 0 < samples <= MAX_SLOTS:
            counts = share_out([phase.weights.get(each.name, 0.0) for each in sources], samples)
            end = sample + samples
            stretches.append(Stretch(number, phase.seq_length, sample, end, tuple(counts)))
        elif samples:
            problems.append(f"phase {phase.name} has {samples} samples; at most {MAX_SLOTS} can be")
        elif number > begun:
            size = size_at(batch_sizes, tokens)
            problems.append(
                f"data.phases[{number}] ({phase.name}) holds no global batch: {size} samples of "
                f"{phase.seq_length} tokens are {size * phase.seq_length}, and it has "
                f"{max(0, phase.end_tokens - tokens)}, from {tokens} (where the batches before it "
                f"end) to {phase.end_tokens}"
            )
        sample += samples
        tokens += samples * phase.seq_length
    if problems:
        raise DataError("\n".join(problems))
    return tuple(stretches)


def check_blocks(phases: Sequence[Phase], sources: Sequence[PlannedSource]) -> None:
    """Refuse sources that have no window for a phase that draws from them.

    Raises:
        DataError: with every such source.
    """
    problems = []
    for source in sources:
        lengths = [phase.seq_length for phase in phases if phase.weights.get(source.name)]
        if lengths:
            problems += _block_problems(source, max(lengths))
    if problems:
        raise DataError("\n".join(problems))


def _block_problems(source: PlannedSource, longest: int) -> list[str]:
    """What keeps a source from giving samples of up to `longest` tokens."""
    drawn = source.end - source.begin
    if source.block_tokens < longest:
        return [
            f"source {source.name} is cut into blocks of {source.block_tokens} tokens, which hold "
            f"no sample of {longest}; data.block_tokens, set when a run begins, must be at least "
            "the longest seq_length"
        ]
    if source.region_blocks:
        return []
    has = (
        f"source {source.name} has {drawn} of its {source.tokens} tokens to draw from (data.split)"
    )
    if drawn <= longest:
        return [
            f"{has}, less than one sample of {longest} and its last label; give it more text, "
            "another split or no weight"
        ]
    return [
        f"{has}, less than one block of {source.block_tokens} and its last label; allowed: "
        f"data.block_tokens={longest} to {drawn - 1}"
    ]
