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
            of the prompt, None for the first.
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
        tokens: the prompt and what followed.
        prompt_tokens: how many of them are the prompt.
        seen: how many of `tokens` the states hold.
        slot: of Mamba-2's states; -1 while it waits.
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
    seen: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    first_page: int = 0
    reserved_pages: int = 0
    siblings: list["Sequence"] = field(default_factory=list)
    stopper: Any = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    cancelled: bool = False

    @property
    def new_tokens(self) -> int:
        """How many followed the prompt."""
        return len(self.tokens) - self.prompt_tokens
