"""The plan of a run's data: which window of which source every sample is, as a pure function.

A plan is a few hundred numbers, whatever the length of the run: what was declared (phases), what
the sources hold (sizes), and how many samples of each source every stretch of the run takes. The
rest is computed: a sample lies in a stretch, `Proportions` give its source and its rank there, and
the source's stream (`megatron_hybrid.data.stream`) gives the window.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_hybrid.config.phases import Phase
from megatron_hybrid.data.batches import Span
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.proportions import MAX_SLOTS, Proportions
from megatron_hybrid.data.stream import PlannedSource, Position, Streams
from megatron_hybrid.errors import in_words
from megatron_hybrid.json_text import parse_json

_FORMAT = "megatron-hybrid data plan"
_VERSION = 1


@dataclass(frozen=True)
class Stretch:
    """Samples `[first_sample, end_sample)` of one phase, laid out at once.

    Attributes:
        phase: number of the phase.
        counts: planned samples of each source of the plan. They sum to more than the stretch has
            where an edit in mid-run has cut it; the order before the cut is as it was planned.
    """

    phase: int
    seq_length: int
    first_sample: int
    end_sample: int
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of its samples."""
        return (self.end_sample - self.first_sample) * self.seq_length

    @cached_property
    def proportions(self) -> Proportions:
        """Which source each of the planned samples is of."""
        return Proportions(self.counts)

    def taken(self, end_sample: int) -> list[int]:
        """Samples of each source in the stretch up to a sample of the run."""
        return self.proportions.before(min(end_sample, self.end_sample) - self.first_sample)


class Places(NamedTuple):
    """Where samples are read, `[n]` int64 each.

    Attributes:
        sources: numbers of the sources in the plan.
        offsets: of the window's first token, among all tokens of its source.
        seq_lengths: tokens of the window, whose last label follows them.
    """

    sources: NDArray[np.int64]
    offsets: NDArray[np.int64]
    seq_lengths: NDArray[np.int64]


@dataclass(frozen=True)
class SourceUse:
    """What one source gives: to a phase, or to the run so far.

    Attributes:
        name: of the source.
        samples, tokens: read; a window counts without its last label.
        epochs: passes over the source from the beginning of the run to then, as the caps count
            them: windows that a change of sequence length skipped are part of the pass.
    """

    name: str
    samples: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class PhaseUse:
    """One phase as it is laid out.

    Attributes:
        phase: as declared, with its weights.
        first_sample, end_sample, start_tokens, end_tokens: of the run, actual: a phase has whole
            global batches. Shares of the phase are `sources[i].samples / (end - first)`.
        sources: every source of the plan in its order, those without a weight here too.
    """

    phase: Phase
    first_sample: int
    end_sample: int
    start_tokens: int
    end_tokens: int
    sources: tuple[SourceUse, ...]


@dataclass(frozen=True)
class Plan:
    """Which window every sample of a run is.

    Attributes:
        seed: of the order.
        sources: all that are declared. Their order is part of the plan: it settles ties.
        phases: as declared, nominal.
        stretches: adjoining, from sample 0 to the end of the run.
    """

    seed: int
    sources: tuple[PlannedSource, ...]
    phases: tuple[Phase, ...]
    stretches: tuple[Stretch, ...]

    @property
    def samples(self) -> int:
        """Samples of the run."""
        return self.stretches[-1].end_sample

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The stretches as `megatron_hybrid.data.batches.Steps` takes them."""
        return tuple(
            Span(stretch.first_sample, stretch.end_sample, stretch.seq_length)
            for stretch in self.stretches
        )

    def seq_length_at(self, sample: int) -> int:
        """Tokens of a sample of the run."""
        return self.stretches[int(self._stretch_numbers(sample)[0])].seq_length

    def locate(self, samples: ArrayLike) -> Places:
        """Where samples of the run are read: numbers `[n]`, below `self.samples`."""
        samples = np.array(samples, dtype=np.int64, ndmin=1)
        numbers = self._stretch_numbers(samples)
        places = Places(*(np.empty_like(samples) for _ in range(3)))
        for number in np.unique(numbers):
            stretch, here = self.stretches[number], numbers == number
            source, rank = stretch.proportions.locate(samples[here] - stretch.first_sample)
            streams, starts = self._streams[number]
            places.sources[here] = source
            places.offsets[here] = streams.locate(source, starts[source] + rank)
            places.seq_lengths[here] = stretch.seq_length
        return places

    def phases_of(self, samples: ArrayLike) -> tuple[str, ...]:
        """The names of the phases of samples of the run, as for `locate`."""
        numbers = self._stretch_numbers(samples)
        return tuple(self.phases[self.stretches[number].phase].name for number in numbers)

    def positions(self, sample: int) -> list[Position | None]:
        """How far each source has been read when `sample` samples have been consumed."""
        positions: list[Position | None] = [None] * len(self.sources)
        for stretch, starts in zip(self.stretches, self._starts, strict=True):
            if stretch.first_sample < sample:
                _advance(positions, stretch, starts, sample)
        return positions

    def consumed(self, sample: int) -> tuple[SourceUse, ...]:
        """What each source has given when `sample` samples have been consumed."""
        return self._uses(self.stretches, sample)

    def table(self) -> tuple[PhaseUse, ...]:
        """Each phase as it is laid out, in the order of the run."""
        uses, tokens = [], 0
        for number, phase in enumerate(self.phases):
            stretches = [stretch for stretch in self.stretches if stretch.phase == number]
            first, end = stretches[0].first_sample, stretches[-1].end_sample
            sources = self._uses(stretches, end)
            start_tokens = tokens
            tokens += (end - first) * phase.seq_length
            uses.append(PhaseUse(phase, first, end, start_tokens, tokens, sources))
        return tuple(uses)

    def to_json(self) -> str:
        """The whole plan as text, for `from_json`."""
        names = [source.name for source in self.sources]
        stretches = [
            dataclasses.asdict(stretch)
            | {"counts": {name: n for name, n in zip(names, stretch.counts, strict=True) if n}}
            for stretch in self.stretches
        ]
        content: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "seed": self.seed}
        content |= {
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "phases": [dataclasses.asdict(phase) for phase in self.phases],
            "stretches": stretches,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Raises:
            DataError: the text is no plan, or one of another version.
        """
        try:
            content = parse_json(text)
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            sources = tuple(_source_from(values) for values in content["sources"])
            stretches = tuple(
                Stretch(
                    **values | {"counts": tuple(values["counts"].get(s.name, 0) for s in sources)}
                )
                for values in content["stretches"]
            )
            phases = tuple(Phase(**values) for values in content["phases"])
            _refuse_what_no_plan_is(sources, stretches, len(phases))
            return cls(content["seed"], sources, phases, stretches)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"this is not a data plan of version {_VERSION}: {in_words(error)}"
            ) from error

    def _stretch_numbers(self, samples: ArrayLike) -> NDArray[np.int64]:
        samples = np.array(samples, dtype=np.int64, ndmin=1)
        assert samples.size == 0 or (samples.min() >= 0 and samples.max() < self.samples)
        return np.searchsorted(self._ends, samples, side="right")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.array([stretch.end_sample for stretch in self.stretches], dtype=np.int64)

    @cached_property
    def _starts(self) -> list[list[int]]:
        """For each stretch, the number of each source's first window in its stream."""
        positions: list[Position | None] = [None] * len(self.sources)
        all_starts = []
        for stretch in self.stretches:
            starts = _starts(self.sources, positions, stretch)
            _advance(positions, stretch, starts, stretch.end_sample)
            all_starts.append(starts)
        return all_starts

    @cached_property
    def _streams(self) -> list[tuple[Streams, NDArray[np.uint64]]]:
        return [
            (Streams(self.sources, stretch.seq_length, self.seed), np.array(starts, np.uint64))
            for stretch, starts in zip(self.stretches, self._starts, strict=True)
        ]

    def _uses(self, stretches: Sequence[Stretch], sample: int) -> tuple[SourceUse, ...]:
        """What each source gives in some of the stretches, up to a sample of the run."""
        samples, tokens = [0] * len(self.sources), [0] * len(self.sources)
        for stretch in stretches:
            if stretch.first_sample < sample:
                for number, taken in enumerate(stretch.taken(sample)):
                    samples[number] += taken
                    tokens[number] += taken * stretch.seq_length
        epochs = [
            float(source.epochs(position))
            for source, position in zip(self.sources, self.positions(sample), strict=True)
        ]
        names = (source.name for source in self.sources)
        return tuple(map(SourceUse, names, samples, tokens, epochs))


def _starts(
    sources: Sequence[PlannedSource],
    positions: Sequence[Position | None],
    stretch: Stretch,
) -> list[int]:
    """The number of each source's first window in a stretch, in its stream; 0 if it has none."""
    return [
        source.resume(position, stretch.seq_length) if count else 0
        for source, position, count in zip(sources, positions, stretch.counts, strict=True)
    ]


def _advance(
    positions: list[Position | None], stretch: Stretch, starts: Sequence[int], end_sample: int
) -> None:
    """Move the positions over a stretch, up to a sample of the run."""
    for number, taken in enumerate(stretch.taken(end_sample)):
        if taken:
            positions[number] = Position(stretch.seq_length, starts[number] + taken)


def _refuse_what_no_plan_is(
    sources: Sequence[PlannedSource], stretches: Sequence[Stretch], phases: int
) -> None:
    """Refuse numbers that contradict each other: nothing after this asks again.

    Raises:
        ValueError: naming the source or the stretch.
    """
    for source in sources:
        region = (source.begin, source.end, source.tokens)
        whole = all(type(value) is int for value in (*region, source.block_tokens))
        if not whole or source.block_tokens < 1 or not 0 < source.fraction <= 1:
            raise ValueError(f"source {source.name} has a number that cannot be")
        if not 0 <= source.begin <= source.end <= source.tokens:
            raise ValueError(f"source {source.name} has no such region {region}")
    if not stretches:
        raise ValueError("it has no stretches")
    sample = 0
    for number, stretch in enumerate(stretches):
        place = (stretch.phase, stretch.first_sample, stretch.end_sample, stretch.seq_length)
        if any(type(value) is not int or value < 0 for value in (*place, *stretch.counts)):
            raise ValueError(f"stretch {number} has a number that is not whole, or below 0")
        samples = stretch.end_sample - stretch.first_sample
        if stretch.first_sample != sample or samples < 1 or stretch.seq_length < 1:
            raise ValueError(f"stretch {number} does not follow on sample {sample}")
        if not samples <= sum(stretch.counts) <= MAX_SLOTS:
            raise ValueError(f"stretch {number} has samples of no source")
        for source, count in zip(sources, stretch.counts, strict=True):
            if count and not source.epoch_windows(stretch.seq_length):
                raise ValueError(f"stretch {number} has samples of {source.name}, which has none")
        sample = stretch.end_sample
    if {stretch.phase for stretch in stretches} != set(range(phases)):
        raise ValueError("a phase has no stretch")


def _source_from(values: dict[str, Any]) -> PlannedSource:
    return PlannedSource(**values | {"shards": tuple(values["shards"])})
