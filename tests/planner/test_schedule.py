"""The simulated schedules: megatron-core's own order, and the closed form of their bubble."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from megatron_hybrid.planner.schedule import (
    chunks_in_flight,
    forward_order,
    simulate,
    stage_order,
    warmup_passes,
)

SIZES = [
    (2, 1, 4), (4, 1, 8), (8, 1, 3), (16, 1, 32), (2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 2, 16),
    (16, 4, 32),
]  # fmt: skip


class Group:
    """A process group's size and rank, which is all that the engine asks it for."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), SIZES)
def test_order_is_the_engines(stages: int, chunks: int, micro_batches: int) -> None:
    """The passes of megatron-core's schedule table, and its number of them before the first
    backward pass, on every stage; backward passes take the chunks from the last.
    """
    table = [tuple(each) for each in get_schedule_table(micro_batches, chunks, stages)]
    assert sorted(forward_order(stages, chunks, micro_batches)) == sorted(table)
    if chunks > 1:
        assert forward_order(stages, chunks, micro_batches) == table
    for stage in range(stages):
        communicator = SimpleNamespace(
            pp_group=Group(stages, stage),
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        )
        _, _, ahead, _ = get_pp_rank_microbatches(
            micro_batches, chunks, stages, p2p_communicator=communicator
        )
        assert warmup_passes(stages, chunks, micro_batches, stage) == ahead
        order = stage_order(stages, chunks, micro_batches, stage)
        kinds = [each.forward for each in order]
        first_backward = kinds.index(False)
        assert first_backward == min(ahead + 1, micro_batches * chunks)
        backward = [(each.micro_batch, each.chunk) for each in order if not each.forward]
        assert backward == [
            (m, chunks - 1 - c) for m, c in forward_order(stages, chunks, micro_batches)
        ]


@pytest.mark.parametrize(
    ("stages", "chunks"), [(1, 1), *((stages, n) for stages in (2, 4, 8, 16) for n in (1, 2, 3))]
)
def test_even_stages_have_the_closed_bubble(stages: int, chunks: int) -> None:
    """(p - 1) / (m v) of the work, exactly, whatever forward and backward cost."""
    for micro_batches in (stages, 2 * stages, 4 * stages):
        found = simulate([1.0] * stages * chunks, [2.0] * stages * chunks, stages, micro_batches)
        work = 3.0 * micro_batches * chunks
        assert found.seconds / work - 1 == pytest.approx(
            (stages - 1) / (micro_batches * chunks), abs=1e-12
        )
        assert found.bubble == pytest.approx(1 - work / found.seconds)


def test_the_slowest_stage_sets_the_pace() -> None:
    """With many micro batches a step takes as long as its slowest stage, and a little."""
    found = simulate([1.0, 3.0, 1.0, 1.0], [2.0, 6.0, 2.0, 2.0], 4, 100)
    assert 900 < found.seconds < 912
    assert found.busy_seconds == (300, 900, 300, 300)


def test_a_transfer_delays() -> None:
    """Two stages, one micro batch: there and back."""
    assert simulate([1, 1], [1, 1], 2, 1, transfer=0.5).seconds == 5


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((4, 1, 8), [[4], [3], [2], [1]]), ((4, 1, 2), [[2], [2], [2], [1]]),
     ((2, 2, 4), [[3, 2], [2, 1]])],
)  # fmt: skip
def test_passes_in_flight(sizes: tuple[int, int, int], expected: list[list[int]]) -> None:
    """1F1B holds p - stage micro batches, no more than there are; interleaving more chunks."""
    assert [chunks_in_flight(*sizes, stage) for stage in range(sizes[0])] == expected


def test_the_fullest_moment_goes_by_size() -> None:
    """With a first chunk much larger than the second, a stage is fullest before it has begun the
    second for as many micro batches as where their number is highest.
    """
    assert chunks_in_flight(2, 2, 4, 1) == [2, 1]
    assert chunks_in_flight(2, 2, 4, 1, [100, 1]) == [3, 0]
    assert chunks_in_flight(2, 2, 4, 1, [1, 100]) == [2, 1]
