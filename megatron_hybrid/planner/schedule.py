"""megatron-core's pipeline schedules, 1F1B and interleaved: order of work, and how long it takes.

The order is that of `megatron.core.pipeline_parallel.schedules`, which tests compare it with.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
    chunks, last = len(forward) // stages, len(forward) - 1
    orders = [stage_order(stages, chunks, micro_batches, stage) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    place, clock = [0] * stages, [0.0] * stages
    left = sum(map(len, orders))
    while left:
        before = left
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                each = order[place[stage]]
                position = each.chunk * stages + stage
                ready = _ready(each, position, last, done, transfer if stages > 1 else 0.0)
                if ready is None:
                    break
                cost = forward[position] if each.forward else backward[position]
                clock[stage] = max(clock[stage], ready) + cost
                done[each.forward, each.micro_batch, position] = clock[stage]
                place[stage] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    busy = tuple(
        micro_batches * (sum(forward[stage::stages]) + sum(backward[stage::stages]))
        for stage in range(stages)
    )
    return Makespan(max(clock), busy)


def _ready(
    each: Pass,
    position: int,
    last: int,
    done: dict[tuple[bool, int, int], float],
    transfer: float,
) -> float | None:
    """When a pass has its input; None: not known yet."""
    if each.forward:
        if position == 0:
            return 0.0
        came = done.get((True, each.micro_batch, position - 1))
    elif position == last:
        return done.get((True, each.micro_batch, position))
    else:
        came = done.get((False, each.micro_batch, position + 1))
    return None if came is None else came + transfer
