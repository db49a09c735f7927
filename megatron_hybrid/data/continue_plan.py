"""Going on with a plan in mid-run: the past stays, the future may be another one.

What was consumed cannot be changed: the seed, the start, weights and sequence length of phases that
have begun, the files and settings of sources that have been read. All else may be: later phases,
more phases or sources, the end of the run. The rest is then laid out anew from where each source
stands.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from megatron_hybrid.config.phases import Phase
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.layout import check_blocks, lay_out, make_plan
from megatron_hybrid.data.plan import Plan, Stretch
from megatron_hybrid.data.stream import PlannedSource


def continue_plan(
    saved: Plan,
    consumed_samples: int,
    phases: Sequence[Phase],
    sources: Sequence[PlannedSource],
    batch_sizes: Sequence[tuple[int, int]],
    seed: int,
    from_data_path: bool = False,
) -> Plan:
    """The plan of a run that goes on: below `consumed_samples` it is the saved one.

    Nothing is laid out anew where the same is declared, whatever the batch sizes are now. Where
    only later phases differ, the current one stays as planned to its end; where its end differs, it
    is cut here.

    Args:
        saved: the plan so far.
        consumed_samples: those of it that have been read.
        phases, sources, batch_sizes, seed: as in `make_plan`, as they are declared now.
        from_data_path: whether the config has `data.data_path` in place of phases and sources:
            messages name the fields that the user wrote.

    Raises:
        DataError: with every edit of the past; or as `make_plan`.
    """
    assert 0 <= consumed_samples <= saved.samples
    if consumed_samples == 0:
        return make_plan(phases, sources, batch_sizes, seed)
    past = _Past(saved, consumed_samples, _DATA_PATH if from_data_path else _PHASES)
    edits = [*past.seed_edits(seed), *past.phase_edits(phases), *past.source_edits(sources)]
    if edits:
        read = f"{consumed_samples} samples ({past.tokens} tokens) have been read with this plan"
        raise DataError("\n".join([f"{read}; what was read stays as it was:", *edits]))
    check_blocks(phases, sources)
    sources = past.in_saved_order(sources)
    current, saved_current = phases[past.current], saved.phases[past.current]
    if current.end_tokens != saved_current.end_tokens:
        stretches = lay_out(phases, sources, batch_sizes, after=past.read_stretches(sources))
    elif tuple(phases[past.current + 1 :]) != saved.phases[past.current + 1 :]:
        stretches = lay_out(phases, sources, batch_sizes, after=past.begun_stretches(sources))
    else:
        stretches = _with_sources(saved.stretches, saved.sources, sources)
    return Plan(seed, tuple(sources), tuple(phases), stretches)


class _Fields(NamedTuple):
    """How the config spells what a plan has; `{}` stands for a phase's number, a source's name."""

    phase: str
    seq_length: str
    weight: str
    path: str
    split: str
    fraction: str


_PHASES = _Fields(
    phase="data.phases[{}]",
    seq_length="data.phases[{}].seq_length",
    weight="data.phases[{}].weights.{}",
    path="data.sources.{}.path",
    split="data.sources.{}.split (or data.split)",
    fraction="data.sources.{}.fraction",
)
_DATA_PATH = _Fields(
    phase="data.data_path",
    seq_length="data.seq_length",
    weight="data.data_path: the weight of {1}",
    path="data.data_path: {}",
    split="data.split",
    fraction="data.sources.{}.fraction",
)


@dataclass(frozen=True)
class _Past:
    """What has been read of a plan, and what that forbids."""

    plan: Plan
    samples: int
    fields: "_Fields"

    @cached_property
    def tokens(self) -> int:
        """Consumed tokens of the run."""
        return sum(use.tokens for use in self.plan.consumed(self.samples))

    @cached_property
    def current(self) -> int:
        """The number of the last phase that has begun."""
        return max(
            stretch.phase for stretch in self.plan.stretches if stretch.first_sample < self.samples
        )

    @cached_property
    def used(self) -> dict[str, PlannedSource]:
        """The sources that have been read."""
        uses = self.plan.consumed(self.samples)
        return {
            source.name: source
            for source, use in zip(self.plan.sources, uses, strict=True)
            if use.samples
        }

    def seed_edits(self, seed: int) -> Iterator[str]:
        if seed != self.plan.seed:
            yield f"training.seed={seed} was {self.plan.seed}"

    def phase_edits(self, phases: Sequence[Phase]) -> Iterator[str]:
        begun = self.plan.phases[: self.current + 1]
        for number, old in enumerate(begun):
            if number == len(phases):
                yield f"{self.fields.phase.format(number)} ({old.name}) has begun and is gone"
                return
            yield from self._edits_of_phase(number, old, phases[number])
        end = phases[self.current].end_tokens
        if end != begun[-1].end_tokens and end < self.tokens:
            if self.current + 1 < len(phases):
                field = self.fields.phase.format(self.current + 1)
                yield f"{field} starts at {end} tokens; allowed: {self.tokens} and more"
            else:
                yield f"the run ends at {end} tokens; allowed: {self.tokens} and more"

    def _edits_of_phase(self, number: int, old: Phase, new: Phase) -> Iterator[str]:
        """What has changed of a phase that has begun; its name and its end are free."""
        if new.start_tokens != old.start_tokens:
            field = self.fields.phase.format(number)
            yield (
                f"{field} starts at {new.start_tokens} tokens; it started at {old.start_tokens}. "
                "start_fraction and last_tokens go by the length of the run; in place of them, "
                f"{field}.start_tokens={old.start_tokens} keeps it where it was"
            )
        if new.seq_length != old.seq_length:
            field = self.fields.seq_length.format(number)
            yield f"{field}={new.seq_length} was {old.seq_length}"
        for name in {**old.weights, **new.weights}:
            was, now = old.weights.get(name, 0.0), new.weights.get(name, 0.0)
            if not math.isclose(was, now, rel_tol=1e-9):
                field = self.fields.weight.format(number, name)
                yield (
                    f"{field} is {now:.6g} of the blend and was {was:.6g}; for another blend from "
                    f"here on, add a phase that starts at {self.tokens} tokens or later"
                )

    def source_edits(self, sources: Sequence[PlannedSource]) -> Iterator[str]:
        declared = {source.name: source for source in sources}
        owners = {shard: source.name for source in sources for shard in source.shards}
        for name, old in self.used.items():
            if name in declared:
                yield from self._edits_of_source(old, declared[name])
                continue
            found = sorted({owners[shard] for shard in old.shards if shard in owners})
            yield f"source {name} has been read and is gone" + (
                f"; {', '.join(found)} has its files, and under another name they would be read "
                "again"
                if found
                else ""
            )

    def _edits_of_source(self, old: PlannedSource, new: PlannedSource) -> Iterator[str]:
        """What has changed of a source that has been read."""
        path = self.fields.path.format(old.name)
        if len(new.shards) != len(old.shards) or new.tokens != old.tokens:
            yield (
                f"{path} has {new.tokens} tokens in {len(new.shards)} files; it had {old.tokens} "
                f"in {len(old.shards)}; new files can be a source of their own"
            )
        elif new.shards != old.shards:
            changed = sum(map(str.__ne__, new.shards, old.shards))
            yield f"{path}: {changed} of its {len(new.shards)} files hold other tokens than before"
        elif (new.begin, new.end) != (old.begin, old.end):
            yield (
                f"{self.fields.split.format(old.name)} leaves tokens {new.begin} to {new.end} of "
                f"source {old.name} to train on; they were {old.begin} to {old.end}"
            )
        if new.fraction != old.fraction:
            field = self.fields.fraction.format(old.name)
            yield f"{field}={new.fraction:g} was {old.fraction:g}"
        if new.block_tokens != old.block_tokens:
            yield (
                f"data.block_tokens={new.block_tokens} was {old.block_tokens} when source "
                f"{old.name} was read"
            )

    def in_saved_order(self, sources: Sequence[PlannedSource]) -> list[PlannedSource]:
        """The sources of the plan in its order, which a blend's order depends on, then the rest."""
        place = {source.name: number for number, source in enumerate(self.plan.sources)}
        return sorted(sources, key=lambda source: place.get(source.name, len(place)))

    def read_stretches(self, sources: Sequence[PlannedSource]) -> tuple[Stretch, ...]:
        """The stretches that have been read, the last one cut where reading stands."""
        read = [
            replace(stretch, end_sample=min(stretch.end_sample, self.samples))
            for stretch in self.plan.stretches
            if stretch.first_sample < self.samples
        ]
        return _with_sources(read, self.plan.sources, sources)

    def begun_stretches(self, sources: Sequence[PlannedSource]) -> tuple[Stretch, ...]:
        """The stretches of the phases that have begun, to their end."""
        begun = [stretch for stretch in self.plan.stretches if stretch.phase <= self.current]
        return _with_sources(begun, self.plan.sources, sources)


def _with_sources(
    stretches: Sequence[Stretch], old: Sequence[PlannedSource], new: Sequence[PlannedSource]
) -> tuple[Stretch, ...]:
    """The same stretches, with their counts in the order of other sources."""
    moved = []
    for stretch in stretches:
        counts = dict(zip((source.name for source in old), stretch.counts, strict=True))
        moved.append(replace(stretch, counts=tuple(counts.get(source.name, 0) for source in new)))
    return tuple(moved)
