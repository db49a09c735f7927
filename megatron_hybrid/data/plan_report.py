"""What a plan means in numbers: each phase, and each source over the whole run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.config.phases import batch_sizes, sources
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batches import Steps, size_at
from megatron_hybrid.data.plan import Plan, SourceUse


@dataclass(frozen=True)
class PhaseReport:
    """One phase as it will run.

    Attributes:
        start_tokens, end_tokens: of the run, at whole global batches.
        batch_sizes: global batch sizes in their order.
        steps: of the phase, without those that are done.
        weights: by source, as declared, summing to 1.
        sources: what each source with a weight gives; epochs are those of the run so far.
    """

    name: str
    start_tokens: int
    end_tokens: int
    first_sample: int
    end_sample: int
    seq_length: int
    batch_sizes: tuple[int, ...]
    steps: int
    weights: dict[str, float]
    sources: tuple[SourceUse, ...]


@dataclass(frozen=True)
class SourceReport:
    """One source over the whole run, in tokens.

    Attributes:
        tokens: in its files.
        held_out: of them, shares of the split that are not trained on.
        left_out: of the rest, what `fraction` leaves out and what fills no block.
        epoch_tokens: in one pass over what is left.
        consumed_tokens: read before the checkpoint that the run goes on from.
        read_tokens: by the end of the run.
        skipped_tokens: passed over by then: the rest of groups of blocks where the sequence length
            changes, and of blocks that whole samples do not fill.
        epochs: by the end of the run.
        max_epochs: its cap; None: it has none.
    """

    name: str
    tokens: int
    held_out: int
    left_out: int
    epoch_tokens: int
    consumed_tokens: int
    read_tokens: int
    skipped_tokens: int
    epochs: float
    max_epochs: float | None


@dataclass(frozen=True)
class PlanReport:
    """A plan in numbers; `consumed_samples` is above 0 where the run goes on.

    Attributes:
        steps: from there to the end.
    """

    tokens: int
    samples: int
    steps: int
    consumed_samples: int
    consumed_tokens: int
    phases: tuple[PhaseReport, ...]
    sources: tuple[SourceReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def report_plan(config: RunConfig, plan: Plan, consumed_samples: int = 0) -> PlanReport:
    """Work out the numbers of a plan.

    Args:
        config: that the plan was made from.
        plan: of the whole run.
        consumed_samples: of the checkpoint that the run goes on from.
    """
    sizes = batch_sizes(config)
    steps = Steps(plan.spans, sizes)
    return PlanReport(
        plan.tokens,
        plan.samples,
        steps.steps_from(consumed_samples),
        consumed_samples,
        steps.tokens_before(consumed_samples),
        _phases(plan, steps, sizes, consumed_samples),
        _sources(config, plan, consumed_samples),
    )


def _phases(
    plan: Plan, steps: Steps, sizes: Sequence[tuple[int, int]], consumed_samples: int
) -> tuple[PhaseReport, ...]:
    reports = []
    for use in plan.table():
        start = size_at(sizes, use.start_tokens)
        later = [size for tokens, size in sizes if use.start_tokens < tokens < use.end_tokens]
        first, end = (
            max(sample, consumed_samples) for sample in (use.first_sample, use.end_sample)
        )
        reports.append(
            PhaseReport(
                use.phase.name,
                use.start_tokens,
                use.end_tokens,
                use.first_sample,
                use.end_sample,
                use.phase.seq_length,
                (start, *later),
                steps.steps_from(first) - steps.steps_from(end),
                dict(use.phase.weights),
                tuple(source for source in use.sources if source.name in use.phase.weights),
            )
        )
    return tuple(reports)


def _sources(config: RunConfig, plan: Plan, consumed_samples: int) -> tuple[SourceReport, ...]:
    caps = _caps(sources(config), config.data.max_epochs)
    rows = zip(
        plan.sources,
        plan.positions(plan.samples),
        plan.consumed(plan.samples),
        plan.consumed(consumed_samples),
        strict=True,
    )
    reports = []
    for source, position, use, consumed in rows:
        region = source.end - source.begin
        epoch_tokens = source.blocks * source.block_tokens
        passed = int(source.epochs(position) * Fraction(epoch_tokens))
        reports.append(
            SourceReport(
                source.name,
                source.tokens,
                source.tokens - region,
                region - epoch_tokens,
                epoch_tokens,
                consumed.tokens,
                use.tokens,
                passed - use.tokens,
                use.epochs,
                caps.get(source.name),
            )
        )
    return tuple(reports)


def _caps(declared: Mapping[str, SourceConfig], default: float | None) -> dict[str, float | None]:
    return {
        name: default if source.max_epochs is None else source.max_epochs
        for name, source in declared.items()
    }
