"""Where the answers to a window are: found by what it is, whichever plan asks for it.

A window is a source's files, its first token among theirs, and its tokens. Where a run's plan is
the one of the cache, or begins as it does, the number of a sample is its place. Else windows are
looked up in a table of the cache's, which is made when it is first needed: 16 bytes a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.plan import Plan, Stretch
from megatron_hybrid.teachers.cache_spec import Cache, Part

_AT_ONCE = 1 << 18  # samples whose places are computed together
_OFFSET_BITS = 48
_NOWHERE = -1
_PARTS: tuple[Part, ...] = ("train", "valid")
Numbers = NDArray[np.int64]


@dataclass
class Finder:
    """Finds samples of a cache. A place is a number: of a sample of training, or of one of
    evaluations after all of these."""

    cache: Cache
    _tables: dict[int, tuple[Numbers, Numbers]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._starts, total = {}, 0
        for part in _PARTS:
            if part in self.cache.plans:
                self._starts[part] = total
                total += self.cache.plans[part].samples
        names = {source.name for plan in self.cache.plans.values() for source in plan.sources}
        self._sources = {name: number for number, name in enumerate(sorted(names))}

    def part_of(self, place: int) -> tuple[Part, int]:
        """The part and the sample of a place."""
        part: Part = "train"
        if place >= self._starts.get("valid", place + 1):
            part = "valid"
        return part, place - self._starts[part]

    def find(
        self, names: Sequence[str], sources: Numbers, offsets: Numbers, seq_length: int
    ) -> Numbers:
        """Places of windows of one length, -1 of those that are not there.

        Args:
            names: of the sources that `sources` are numbers of, `[n]`.
            offsets: `[n]`.
        """
        keys, places = self._table(seq_length)
        if not len(keys):
            return np.full(len(offsets), _NOWHERE)
        asked = self._keys(names, sources, offsets)
        at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
        return np.where(keys[at] == asked, places[at], _NOWHERE)

    def guess(
        self,
        names: Sequence[str],
        samples: Numbers,
        sources: Numbers,
        offsets: Numbers,
        length: int,
    ) -> Numbers:
        """As `find`, of samples of a plan that may well be the cache's: without a table then."""
        asked = self._keys(names, sources, offsets)
        for part, plan in self.cache.plans.items():
            if samples.max() >= plan.samples:
                continue
            located = plan.locate(samples)
            its = self._keys(_names(plan), located.sources, located.offsets)
            if (its == asked).all() and (located.seq_lengths == length).all():
                return samples + self._starts[part]
        return self.find(names, sources, offsets, length)

    def _keys(self, names: Sequence[str], sources: Numbers, offsets: Numbers) -> Numbers:
        """A number a window; of a source that the cache has not, one that no window has."""
        numbers = np.array([self._sources.get(name, (1 << 14)) for name in names], np.int64)
        return (numbers[sources] << _OFFSET_BITS) | offsets

    def _table(self, seq_length: int) -> tuple[Numbers, Numbers]:
        """Keys of all windows of a length, ascending, and their places."""
        if seq_length not in self._tables:
            keys, places = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
            for part, plan in self.cache.plans.items():
                for stretch in plan.stretches:
                    if stretch.seq_length == seq_length:
                        for samples in _ranges(stretch.first_sample, stretch.end_sample):
                            located = plan.locate(samples)
                            found = self._keys(_names(plan), located.sources, located.offsets)
                            keys.append(found)
                            places.append(samples + self._starts[part])
            whole = np.concatenate(keys)
            order = np.argsort(whole, kind="stable")
            self._tables[seq_length] = whole[order], np.concatenate(places)[order]
        return self._tables[seq_length]

    def places(
        self, plan: Plan, part: Part, first_sample: int
    ) -> Iterator[tuple[Numbers, Numbers]]:
        """Samples of a plan from one on, some at a time, and their places."""
        same = self._as_far(plan, part)
        for stretch in plan.stretches:
            first = max(first_sample, stretch.first_sample)
            for samples in _ranges(first, min(stretch.end_sample, same)):
                yield samples, samples + self._starts[part]
            for samples in _ranges(max(first, same), stretch.end_sample):
                located = plan.locate(samples)
                found = self.find(
                    _names(plan), located.sources, located.offsets, stretch.seq_length
                )
                yield samples, found

    def _as_far(self, plan: Plan, part: Part) -> int:
        """Up to which sample a plan is the cache's."""
        its = self.cache.plans.get(part)
        if its is None or (its.seed, its.sources) != (plan.seed, plan.sources):
            return 0
        end = 0
        for one, other in zip(its.stretches, plan.stretches, strict=False):
            if _order(one) != _order(other):
                break
            end = min(one.end_sample, other.end_sample)
            if one.end_sample != other.end_sample:
                break
        return end


def _order(stretch: Stretch) -> tuple[object, ...]:
    return stretch.seq_length, stretch.first_sample, stretch.counts


def _names(plan: Plan) -> list[str]:
    return [source.name for source in plan.sources]


def _ranges(first: int, end: int) -> Iterator[Numbers]:
    for start in range(first, end, _AT_ONCE):
        yield np.arange(start, min(start + _AT_ONCE, end))


def lacking(
    cache: Cache, plans: Mapping[Part, Plan], first_sample: int, name: str
) -> Iterator[str]:
    """What a cache has not of what a run will ask of it: a sentence each.

    Args:
        plans: of the run.
        first_sample: of training from which it goes on.
        name: the option and its value, for the sentence.
    """
    problems = list(_other_sources(cache, plans, name))
    yield from problems
    if problems:
        return
    finder, whole = Finder(cache), _whole_blocks(cache)
    for part, plan in plans.items():
        missing, unknown, first = 0, 0, _NOWHERE
        for samples, places in finder.places(plan, part, first_sample if part == "train" else 0):
            there = places != _NOWHERE
            unknown += int((~there).sum())
            there[there] = _in_whole_blocks(finder, places[there], whole)
            if not there.all():
                first = int(samples[~there][0]) if first == _NOWHERE else first
                missing += int((~there).sum())
        if missing:
            yield _sentence(name, part, plan, (missing, unknown, first))


def _sentence(name: str, part: Part, plan: Plan, counts: tuple[int, int, int]) -> str:
    missing, unknown, first = counts
    located = plan.locate(first)
    source = plan.sources[int(located.sources[0])].name
    why = (
        f"{unknown} of them are in no plan of it, which was of other phases, sources or lengths"
        if unknown
        else "`megatron-hybrid distill cache` was not finished"
    )
    return (
        f"{name} lacks {missing} of the {plan.samples} samples of the {part} plan; the first is "
        f"sample {first}, {located.seq_lengths[0]} tokens from token {located.offsets[0]} of "
        f"{source} on; {why}"
    )


def _other_sources(cache: Cache, plans: Mapping[Part, Plan], name: str) -> Iterator[str]:
    known = {source.name: source for source in cache.plans["train"].sources}
    for source in plans["train"].sources:
        if source.name in known and known[source.name].shards != source.shards:
            yield f"{name}: source {source.name} holds other tokens than the teacher has seen"


def _whole_blocks(cache: Cache) -> set[str]:
    """Files of blocks that are there, below the folder."""
    found = set()
    for part in cache.plans:
        top = cache.folder / part
        for folder in top.iterdir() if top.is_dir() else ():
            found |= {f"{part}/{folder.name}/{file.name}" for file in folder.iterdir()}
    return found


def _in_whole_blocks(finder: Finder, places: Numbers, whole: set[str]) -> NDArray[np.bool_]:
    """Which of some places are in files that are there; places go by blocks."""
    found = np.zeros(len(places), np.bool_)
    order = np.argsort(places, kind="stable")
    ascending, at = places[order], 0
    while at < len(places):
        part, sample = finder.part_of(int(ascending[at]))
        block = finder.cache.block_of(part, sample)
        end = int(ascending[at]) - sample + block.end_sample
        upto = int(np.searchsorted(ascending, end))
        found[order[at:upto]] = finder.cache.name(block) in whole
        at = upto
    return found
