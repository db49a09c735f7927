"""The steps of a run in closed form, held against walking through them one by one."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_hybrid.data.batches import Span, Steps, whole_batches


@dataclass(frozen=True)
class _Step:
    first_sample: int
    size: int
    tokens_before: int
    seq_length: int


def _walk(spans: list[Span], sizes: list[tuple[int, int]], sample: int, tokens: int) -> list[_Step]:
    """The steps from `sample` on, which `tokens` tokens lie before, one after the other."""
    steps = []
    for span in spans:
        while span.first_sample <= sample < span.end_sample:
            size = [size for from_tokens, size in sizes if from_tokens <= tokens][-1]
            size = min(size, span.end_sample - sample)
            steps.append(_Step(sample, size, tokens, span.seq_length))
            sample, tokens = sample + size, tokens + size * span.seq_length
    return steps


@st.composite
def _schedules(draw: st.DrawFn) -> tuple[list[Span], list[tuple[int, int]]]:
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any))
    ends = list(accumulate(lengths, initial=0))
    spans = [Span(*ends, draw(st.integers(1, 9))) for ends in pairwise(ends)]
    changes = draw(st.lists(st.integers(1, 1000), unique=True, max_size=4))
    from_tokens = [0, *sorted(changes)]
    return spans, [(tokens, draw(st.integers(1, 12))) for tokens in from_tokens]


@given(schedule=_schedules(), data=st.data())
def test_every_answer_is_that_of_walking(
    schedule: tuple[list[Span], list[tuple[int, int]]], data: st.DataObject
) -> None:
    """Sizes, tokens, lengths and counts of steps from any sample on, a step's first or not, equal
    those of a walk over the steps from there."""
    spans, sizes = schedule
    steps = Steps(spans, sizes)
    sample = data.draw(st.integers(0, steps.samples))
    walk = _walk(spans, sizes, sample, steps.tokens_before(sample))
    assert steps.steps_from(sample) == len(walk)
    assert steps.batch_sizes_from(sample) == {step.size for step in walk}
    assert sum(step.size for step in walk) == steps.samples - sample
    for step in walk:
        assert steps.batch_size(step.first_sample) == step.size
        assert steps.tokens_before(step.first_sample) == step.tokens_before
        assert steps.seq_length(step.first_sample) == step.seq_length
    assert steps.tokens_before(steps.samples) == steps.tokens


def test_a_batch_never_crosses_a_change_of_length() -> None:
    """The last batch of a span is short, and the next begins with the next span."""
    steps = Steps([Span(0, 10, 8), Span(10, 20, 16)], [(0, 4)])
    sizes, sample = [], 0
    while sample < steps.samples:
        sizes.append(steps.batch_size(sample))
        sample += sizes[-1]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert (steps.tokens, steps.steps_from(0), steps.batch_sizes_from(10)) == (240, 6, {4, 2})


def test_a_run_of_years_is_counted_at_once() -> None:
    """2 * 10**9 samples with a ramp are not walked through."""
    steps = Steps([Span(0, 2 * 10**9, 8192)], [(0, 192), (10**12, 384), (2 * 10**12, 768)])
    first = -(-(10**12) // (192 * 8192))
    second = -(-(2 * 10**12 - first * 192 * 8192) // (384 * 8192))
    changed = first * 192 + second * 384
    assert steps.steps_from(0) == first + second + -(-(2 * 10**9 - changed) // 768)
    assert [steps.batch_size(first * 192 - 192), steps.batch_size(first * 192)] == [192, 384]
    assert [steps.batch_size(changed - 384), steps.batch_size(changed)] == [384, 768]


@given(
    sizes=_schedules().map(lambda schedule: schedule[1]),
    tokens=st.integers(0, 500),
    more=st.integers(0, 2000),
    seq_length=st.integers(1, 9),
    reach=st.booleans(),
)
def test_whole_batches_fit_or_reach(
    sizes: list[tuple[int, int]], tokens: int, more: int, seq_length: int, reach: bool
) -> None:
    """The batches between two numbers of tokens are as many as fit, or one more where they must
    reach the end, each of the size that holds when it begins."""
    samples = whole_batches(sizes, tokens, tokens + more, seq_length, reach=reach)
    walk = _walk([Span(0, more + 20, seq_length)], sizes, 0, tokens)
    ends = [step.tokens_before + step.size * seq_length for step in walk]
    inside = sum(end <= tokens + more for end in ends)
    count = inside + (reach and (inside == 0 or ends[inside - 1] < tokens + more) and more > 0)
    assert samples == sum(step.size for step in walk[:count])
