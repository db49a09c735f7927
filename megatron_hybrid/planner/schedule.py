"""megatron-core's pipeline schedules, 1F1B and interleaved: order of work, and how long it takes.

The order is that of `megatron.core.pipeline_parallel.schedules`, which tests compare it with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

# Micro batches for each stage after which a schedule only repeats itself: the first ones fill the
# pipeline, which takes no more than three.
ROUNDS = 6


@dataclass(frozen=True)
class Pass:
    """One chunk's forward or backward pass of one micro batch."""

    forward: bool
    micro_batch: int
    chunk: int


def warmup_passes(stages: int, chunks: int, micro_batches: int, stage: int) -> int:
    """Forward passes of a stage before its first backward pass, without the one right before it."""
    total = micro_batches * chunks
    if chunks == 1:
        return min(stages - stage - 1, total)
    return min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)


def forward_order(stages: int, chunks: int, micro_batches: int) -> list[tuple[int, int]]:
    """(micro batch, chunk) of forward passes: `stages` micro batches of a chunk at a time."""
    if chunks == 1:
        return [(number, 0) for number in range(micro_batches)]
    return [
        (number, chunk)
        for first in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for number in range(first, min(first + stages, micro_batches))
    ]


def stage_order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[Pass]:
    """All passes of a stage, in the order in which it does them."""
    forward = forward_order(stages, chunks, micro_batches)
    backward = [(number, chunks - 1 - chunk) for number, chunk in forward]
    ahead = warmup_passes(stages, chunks, micro_batches, stage)
    order = [Pass(True, *each) for each in forward[:ahead]]
    for index, each in enumerate(forward[ahead:]):
        order += [Pass(True, *each), Pass(False, *backward[index])]
    return order + [Pass(False, *each) for each in backward[len(forward) - ahead :]]


def chunks_in_flight(
    stages: int,
    chunks: int,
    micro_batches: int,
    stage: int,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """How many passes of each chunk a stage has begun and not ended, at its fullest moment.

    Args:
        sizes: what a pass of each chunk takes, in any unit; None: all the same.
    """
    micro_batches = min(micro_batches, ROUNDS * stages)
    weights = sizes or [1] * chunks
    most, now = [0] * chunks, [0] * chunks
    filled = fullest = 0
    for each in stage_order(stages, chunks, micro_batches, stage):
        step = 1 if each.forward else -1
        now[each.chunk] += step
        filled += step * weights[each.chunk]
        if filled > fullest:
            most, fullest = list(now), filled
    return most


@dataclass(frozen=True)
class Makespan:
    """How long a step's passes take.

    Attributes:
        seconds: from the first pass to the last.
        busy_seconds: of each stage.
    """

    seconds: float
    busy_seconds: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they wait."""
        return 1 - sum(self.busy_seconds) / (len(self.busy_seconds) * self.seconds)


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    stages: int,
    micro_batches: int,
    *,
    transfer: float = 0.0,
) -> Makespan:
    """Run a step's passes, each as soon as its stage is free and its input is there.

    Args:
        forward: seconds of a micro batch's forward pass through each chunk, in the order of the
            layers: chunk i is on stage i % stages.
        backward: the same of the backward pass.
        transfer: seconds that hidden states or their gradients take to the next stage.
    """
    hop = transfer if stages > 1 else 0.0
    costs = (backward, forward)
    done: list[float] = []
    clock = [0.0] * stages
    for each in _in_order(stages, len(forward) // stages, micro_batches):
        ready = 0.0 if each.after is None else done[each.after] + hop * each.comes
        clock[each.stage] = max(clock[each.stage], ready) + costs[each.forward][each.position]
        done.append(clock[each.stage])
    busy = tuple(
        micro_batches * (sum(forward[stage::stages]) + sum(backward[stage::stages]))
        for stage in range(stages)
    )
    return Makespan(max(clock), busy)


class _Step(NamedTuple):
    """A pass in the order in which passes can be done, whatever they cost.

    Attributes:
        position: of its chunk among all of them.
        after: the place in this order of the pass that its input comes from; None: from none.
        comes: whether that was on another stage.
    """

    stage: int
    forward: bool
    position: int
    after: int | None
    comes: bool


@lru_cache(maxsize=16)
def _in_order(stages: int, chunks: int, micro_batches: int) -> tuple[_Step, ...]:
    """All passes of all stages, each after those that it waits for."""
    orders = [stage_order(stages, chunks, micro_batches, stage) for stage in range(stages)]
    last = stages * chunks - 1
    found: list[_Step] = []
    places: dict[tuple[bool, int, int], int] = {}
    at = [0] * stages
    while len(found) < sum(map(len, orders)):
        before = len(found)
        for stage, order in enumerate(orders):
            while at[stage] < len(order):
                each = order[at[stage]]
                position = each.chunk * stages + stage
                source = _source(each, position, last)
                if source is not None and source not in places:
                    break
                comes = source is not None and source[2] != position
                after = None if source is None else places[source]
                places[each.forward, each.micro_batch, position] = len(found)
                found.append(_Step(stage, each.forward, position, after, comes))
                at[stage] += 1
        assert len(found) > before, "the schedule waits for itself"
    return tuple(found)


def _source(each: Pass, position: int, last: int) -> tuple[bool, int, int] | None:
    """The pass whose output a pass takes: its direction, micro batch and position."""
    if each.forward:
        return None if position == 0 else (True, each.micro_batch, position - 1)
    if position == last:
        return True, each.micro_batch, position
    return False, each.micro_batch, position + 1
