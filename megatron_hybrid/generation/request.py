"""What goes through the engine: a request, its sequences, and the events that tell of them."""

from dataclasses import dataclass, field
from typing import Any

from megatron_hybrid.generation.params import SamplingParams

# Why a sequence ended: the token that ends a document, a text of `stop`, `max_new_tokens`,
# somebody who no longer wants it.
ENDS = ("eod", "stop", "length", "cancelled")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of a token, and the likeliest ones at its place: (token, log-prob.)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one continuation, or its end.

    Attributes:
        request: the number that `Engine.submit` gave.
        continuation: which of the request's `n`, from 0.
        token: None where it ends without one (cancelled, or no new token was asked for).
        logprob: where `logprobs` asked for them.
        end: one of `ENDS` with the last event of a continuation, else None. The token of an event
            that ends with "eod" is that token.
        prompt_logprobs: with the first event of a request that asked for them: one for each token
            of the prompt, None for the first. With that of a continuation that was given: one for
            each of its tokens.
    """

    request: int
    continuation: int
    token: int | None
    logprob: TokenLogprob | None = None
    end: str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass
class Completion:
    """A whole continuation.

    Attributes:
        tokens: without the one that ends the document; with those of a stop text, if any.
        text: without the stop text; None where there is no tokenizer for it.
        logprobs: one a token, where they were asked for.
        end: one of `ENDS`.
        prompt_logprobs: as `Event`'s.
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    end: str = ""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(eq=False)
class Sequence:
    """One continuation under way, and where its states are.

    Attributes:
        request, continuation: as in `Event`.
        tokens: the prompt, with a continuation that was given, and what followed.
        prompt_tokens: how many of them were there from the start.
        shared: how many of those its siblings have, too.
        before: meta tokens before the first of `tokens`.
        seen: how many of `tokens` the states hold.
        slot: of Mamba's states; -1 while it waits.
        pages: of keys and values, in order of the text; the first is that of token
            `first_page * page_tokens`.
        reserved_pages: that it may have at once.
        siblings: continuations of the same prompt that take over its states after the prompt.
        stopper: knows the stop texts.
    """

    request: int
    continuation: int
    params: SamplingParams
    tokens: list[int]
    prompt_tokens: int
    shared: int
    before: int = 0
    seen: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    first_page: int = 0
    reserved_pages: int = 0
    siblings: list["Sequence"] = field(default_factory=list)
    stopper: Any = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cancelled: bool = False

    @classmethod
    def of(
        cls,
        request: int,
        continuation: int,
        params: SamplingParams,
        prompt: list[int],
        given: list[int],
        before: int,
    ) -> "Sequence":
        """One of a prompt, with a continuation that was given or with none."""
        tokens = [*prompt, *given]
        sequence = cls(request, continuation, params, tokens, len(tokens), len(prompt), before)
        if not given:
            sequence.prompt_logprobs.append(None)  # nothing tells of the first
        return sequence

    @property
    def place(self) -> int:
        """That of the next token, the first of all being 0: how many the states hold."""
        return self.before + self.seen

    @property
    def goal(self) -> int:
        """How many tokens are to be seen before it does something else.

        Those that it shares with siblings first, then all that are there; but for the last one
        where no other follows, as only what follows would be known by it.
        """
        all_there = max(1, self.prompt_tokens - (self.params.max_new_tokens == 0))
        return min(self.shared, all_there) if self.siblings else all_there

    @property
    def tells(self) -> bool:
        """Whether it, rather than a sibling, tells of tokens that were there from the start."""
        return self.continuation == 0 or self.shared < self.prompt_tokens

    @property
    def told(self) -> range:
        """Places of the tokens that were there from the start and that it tells of."""
        if not (self.params.prompt_logprobs and self.tells):
            return range(0)
        return range(self.shared if self.shared < self.prompt_tokens else 1, self.prompt_tokens)

    @property
    def new_tokens(self) -> int:
        """How many followed the prompt."""
        return len(self.tokens) - self.prompt_tokens
