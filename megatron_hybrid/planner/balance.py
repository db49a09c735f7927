"""Cut a pattern into pipeline segments so that a step takes the least time."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from megatron_hybrid.planner.costs import Costs
from megatron_hybrid.planner.schedule import simulate

# So many ways to cut are tried one by one; beyond that a search goes from good ones to better ones.
MOST_SPLITS = 3000
# More micro batches say nothing more about which split is better, but take longer to simulate.
MICRO_BATCHES_A_STAGE = 2
# Layers that cuts move by in a step of the search, and how many neighbouring cuts move together: a
# layer then goes from one segment to another some way off.
_REACH, _MOST_CUTS = 2, 8
# Starts of the search that are drawn, where layers times segments are no more than this.
_DRAWN, _SHORT = 12, 320


@dataclass(frozen=True)
class Split:
    """A way to cut the layers.

    Attributes:
        segments: the names of each chunk's layers, in their order, as `Balancer.layers` has them.
        step_ms: predicted time of all passes of a step.
        bubble: the share of the stages' time in which they wait.
    """

    segments: tuple[Sequence[str], ...]
    step_ms: float
    bubble: float

    @property
    def pattern(self) -> str:
        """With `|` between segments, as a config takes it."""
        # A name begins with the symbol of its kind.
        return "|".join("".join(name[0] for name in segment) for segment in self.segments)


@dataclass(frozen=True)
class Balancer:
    """Times splits of one pattern.

    Attributes:
        layers: of each its name in `costs`: its symbol, or more where layers are unlike.
        stages: pipeline stages.
        chunks: segments on each stage.
        micro_batches: of a step, on one data-parallel rank.
        transfer_ms: of hidden states to the next stage.
    """

    layers: Sequence[str]
    costs: Costs
    stages: int
    chunks: int
    micro_batches: int
    transfer_ms: float = 0.0

    @property
    def parts(self) -> int:
        """Segments in all."""
        return self.stages * self.chunks

    def timed(self, segments: tuple[Sequence[str], ...]) -> Split:
        """The time of a split."""
        costs = self.costs.chunks(segments)
        made = simulate(
            [cost.forward_ms for cost in costs],
            [cost.backward_ms for cost in costs],
            self.stages,
            self.micro_batches,
            transfer=self.transfer_ms,
        )
        return Split(segments, made.seconds, made.bubble)

    def even(self) -> Split:
        """As many layers in each segment as in the others, or one more in the first ones."""
        size, more = divmod(len(self.layers), self.parts)
        cuts = [i * size + min(i, more) for i in range(1, self.parts)]
        return self.timed(self._cut(cuts))

    def best(self) -> Split:
        """The fastest of all splits where there are few, else the best that a search finds."""
        count = min(self.micro_batches, MICRO_BATCHES_A_STAGE * self.stages)
        short = replace(self, micro_batches=count)
        few = math.comb(len(self.layers) - 1, self.parts - 1) <= MOST_SPLITS
        found = short.exhaustive() if few else short.searched()
        return self.timed(found.segments)

    def quick(self) -> Split:
        """The split whose slowest segment is fastest: near the best, and soon found."""
        return self.timed(self._cut(self._least_maximum()))

    def exhaustive(self) -> Split:
        """The fastest of all splits; of equal ones the first."""
        every = combinations(range(1, len(self.layers)), self.parts - 1)
        return self._fastest(self._cut(cuts) for cuts in every)

    def searched(self) -> Split:
        """From the split whose slowest segment is fastest, the even one and others, cut by cut.

        Where the pattern is short there are other ones, drawn at random, always the same.
        """
        starts = [self._least_maximum(), self._cuts(self.even().segments)]
        draws = random.Random(0)
        if len(self.layers) * self.parts <= _SHORT:
            places = range(1, len(self.layers))
            starts += [sorted(draws.sample(places, self.parts - 1)) for _ in range(_DRAWN)]
        found = [self._climb(list(cuts)) for cuts in starts]
        return min(found, key=lambda split: split.step_ms)

    def _climb(self, cuts: list[int]) -> Split:
        """Move one cut, or some neighbours together, as long as that is faster."""
        best = self.timed(self._cut(cuts))
        while True:
            better = self._fastest(map(self._cut, self._neighbours(cuts)), best)
            if better is best:
                return best
            best, cuts = better, self._cuts(better.segments)

    def _neighbours(self, cuts: Sequence[int]) -> Iterator[list[int]]:
        ends = [0, *cuts, len(self.layers)]
        for width in range(1, min(self.parts, _MOST_CUTS + 1)):
            for first in range(1, len(ends) - width):
                for move in (*range(-_REACH, 0), *range(1, _REACH + 1)):
                    moved = list(ends)
                    for place in range(first, first + width):
                        moved[place] += move
                    if all(a < b for a, b in pairwise(moved)):
                        yield moved[1:-1]

    def _fastest(
        self, splits: Iterator[tuple[Sequence[str], ...]], best: Split | None = None
    ) -> Split:
        """The fastest of `best` and `splits`, leaving out what cannot be."""
        for segments in splits:
            if best is not None and self._at_least(segments) >= best.step_ms:
                continue
            split = self.timed(segments)
            if best is None or split.step_ms < best.step_ms * (1 - 1e-12):
                best = split
        assert best is not None
        return best

    def _at_least(self, segments: tuple[Sequence[str], ...]) -> float:
        """A time that the split cannot beat: of some stage, what comes before its first micro batch
        and after its last one, which go through the stages before it, and all of its work.
        """
        costs = [cost.total_ms for cost in self.costs.chunks(segments)]
        before = most = 0.0
        for stage in range(self.stages):
            most = max(most, before + self.micro_batches * sum(costs[stage :: self.stages]))
            before += costs[stage]
        return most

    def _least_maximum(self) -> list[int]:
        """The cuts whose most expensive segment is cheapest, by dynamic programming."""
        total = [0.0]
        for kind in self.layers:
            total.append(total[-1] + self.costs.of[kind].total_ms)
        first, last = (
            self.costs.of[name].total_ms if name in self.costs.of else 0.0
            for name in ("embedding", "output")
        )  # fmt: skip
        count = len(self.layers)
        best: list[list[float]] = [[math.inf] * (count + 1) for _ in range(self.parts + 1)]
        came: list[list[int]] = [[0] * (count + 1) for _ in range(self.parts + 1)]
        best[0][0] = 0.0
        for part in range(1, self.parts + 1):
            extra = (first if part == 1 else 0.0) + (last if part == self.parts else 0.0)
            for end in range(part, count + 1):
                for start in range(end - 1, part - 2, -1):
                    own = total[end] - total[start] + extra
                    if own > best[part][end]:  # and longer ones cost more still
                        break
                    worst = max(best[part - 1][start], own)
                    if worst <= best[part][end]:
                        best[part][end], came[part][end] = worst, start
        cuts, end = [], count
        for part in range(self.parts, 1, -1):
            end = came[part][end]
            cuts.append(end)
        return cuts[::-1]

    def _cut(self, cuts: Sequence[int]) -> tuple[Sequence[str], ...]:
        ends = [0, *cuts, len(self.layers)]
        return tuple(self.layers[a:b] for a, b in pairwise(ends))

    def _cuts(self, segments: Sequence[Sequence[str]]) -> list[int]:
        cuts, at = [], 0
        for segment in segments[:-1]:
            at += len(segment)
            cuts.append(at)
        return cuts
