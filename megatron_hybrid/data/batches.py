"""The global batches of a run: which samples each step takes, in closed form.

Samples are numbered through the run. A span is a row of samples of one sequence length; a global
batch never crosses the end of its span, so the last batch of a span may be short. The size of a
batch is decided by the tokens consumed before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Samples `[first_sample, end_sample)`, each of `seq_length` tokens."""

    first_sample: int
    end_sample: int
    seq_length: int


@dataclass(frozen=True)
class _Run:
    """Global batches of one size that follow each other; the last one may be short."""

    first_sample: int
    end_sample: int
    size: int

    @property
    def steps(self) -> int:
        return -(-(self.end_sample - self.first_sample) // self.size)

    @property
    def sizes(self) -> set[int]:
        whole, rest = divmod(self.end_sample - self.first_sample, self.size)
        return ({self.size} if whole else set()) | ({rest} if rest else set())


class Steps:
    """The global batches of a run.

    Every question takes a `sample` at which a batch begins, so that a run may go on at any sample
    with other sizes; nothing depends on the batches before it.

    Args:
        spans: adjoining, the first from sample 0; empty ones are left out.
        sizes: `(from_tokens, samples)`, ascending, the first from 0: a batch that begins when at
            least `from_tokens` tokens have been consumed has that many samples.

    Attributes:
        samples: of all spans.
        tokens: of all spans.
    """

    def __init__(self, spans: Sequence[Span], sizes: Sequence[tuple[int, int]]) -> None:
        self._spans = [span for span in spans if span.end_sample > span.first_sample]
        self._sizes = list(sizes)
        self._tokens_before_span: list[int] = []
        self.samples = 0
        self.tokens = 0
        for span in self._spans:
            assert span.first_sample == self.samples, "spans adjoin"
            self._tokens_before_span.append(self.tokens)
            self.samples = span.end_sample
            self.tokens += (span.end_sample - span.first_sample) * span.seq_length
        assert self._sizes[0][0] == 0, "the first size holds from the first token on"

    def seq_length(self, sample: int) -> int:
        """Tokens of a sample of the run; beyond its end, those of the last one."""
        return self._spans[self._span_number(sample)].seq_length

    def tokens_before(self, sample: int) -> int:
        """Tokens of the samples `[0, sample)`."""
        number = self._span_number(sample)
        span = self._spans[number]
        return self._tokens_before_span[number] + (sample - span.first_sample) * span.seq_length

    def batch_size(self, sample: int) -> int:
        """Samples of the global batch that begins at `sample`, which must be in the run."""
        span = self._spans[self._span_number(sample)]
        assert 0 <= sample < span.end_sample, f"the run has no sample {sample}"
        return min(size_at(self._sizes, self.tokens_before(sample)), span.end_sample - sample)

    def steps_from(self, sample: int) -> int:
        """Global batches from the one that begins at `sample` to the end of the run."""
        return sum(run.steps for run in self._runs_from(sample))

    def batch_sizes_from(self, sample: int) -> set[int]:
        """The sizes that occur from `sample` on, those of short batches included."""
        return set().union(*(run.sizes for run in self._runs_from(sample)))

    def _span_number(self, sample: int) -> int:
        number = sum(span.end_sample <= sample for span in self._spans)
        return min(number, len(self._spans) - 1)

    def _runs_from(self, sample: int) -> Iterator[_Run]:
        while sample < self.samples:
            span = self._spans[self._span_number(sample)]
            tokens = self.tokens_before(sample)
            size = size_at(self._sizes, tokens)
            batch_tokens = size * span.seq_length
            end = span.end_sample
            change = _next_change(self._sizes, tokens)
            if change is not None:
                end = min(end, sample - (tokens - change) // batch_tokens * size)
            yield _Run(sample, end, size)
            sample = end


def size_at(sizes: Sequence[tuple[int, int]], tokens: int) -> int:
    """Samples of a global batch that begins after `tokens` consumed tokens."""
    return [size for from_tokens, size in sizes if from_tokens <= tokens][-1]


def whole_batches(
    sizes: Sequence[tuple[int, int]], tokens: int, end_tokens: int, seq_length: int, *, reach: bool
) -> int:
    """Samples of the whole global batches between two numbers of consumed tokens.

    Args:
        sizes: as in `Steps`.
        tokens: consumed before the first batch.
        end_tokens: where the batches should end.
        seq_length: tokens of each sample.
        reach: take one batch more rather than end before `end_tokens`.
    """
    samples = 0
    while tokens < end_tokens:
        size = size_at(sizes, tokens)
        batch_tokens = size * seq_length
        left = end_tokens - tokens
        batches = -(-left // batch_tokens) if reach else left // batch_tokens
        change = _next_change(sizes, tokens)
        if change is not None:
            batches = min(batches, -(-(change - tokens) // batch_tokens))
        if not batches:
            break
        samples += batches * size
        tokens += batches * batch_tokens
    return samples


def _next_change(sizes: Sequence[tuple[int, int]], tokens: int) -> int | None:
    """The number of tokens after `tokens` from which another size holds."""
    return next((from_tokens for from_tokens, _ in sizes if from_tokens > tokens), None)
