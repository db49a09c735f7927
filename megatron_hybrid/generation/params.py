"""What a request asks for: how its tokens are drawn, when it ends, and what is told of it."""

from dataclasses import dataclass

from megatron_hybrid.bounds import LEAST_REAL, MOST_COUNT, MOST_NEW_TOKENS, MOST_REAL, real_problem
from megatron_hybrid.errors import UserError

# What tells draws apart; where none is made, nothing reads it.
_OF_DRAWS = ("top_k", "top_p", "min_p", "seed")
MOST_CONTINUATIONS = 4096
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 1000


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends.

    Filters apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: it ends there at the latest; 0 only looks at the prompt.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: only among the k likeliest; 0 for all.
        top_p: only among the likeliest whose probabilities first add up to p; 1 for all.
        min_p: only among those at least p times as probable as the likeliest; 0 for all.
        repetition_penalty: a logit of a token that was there before (the prompt counts) is divided
            by it where it is positive, and multiplied where it is negative; 1 for none.
        seed: of the draws; a request's draws depend on it, the continuation and the place alone.
        n: continuations of the prompt, which is computed once for all of them.
        stop: texts that end it; they are not part of its text.
        ignore_eod: go on beyond the tokens that end a text.
        logprobs: None, or how many of the likeliest tokens are told at each place, with their
            log-probabilities and that of the chosen one. They are the model's own: before penalty,
            temperature and filters.
        prompt_logprobs: tell the log-probability of each token of the prompt, too.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eod: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        problems = [*self._whole_problems(), *self._real_problems(), *self._stop_problems()]
        if problems:
            raise UserError("\n".join(problems))

    @property
    def unread(self) -> str | None:
        """What has no effect beside the rest, and why; None where all has some."""
        if self.temperature > 0:
            return None
        names = [name for name in _OF_DRAWS if getattr(self, name) != getattr(type(self), name)]
        parts = [f"{name}={getattr(self, name)} has no effect" for name in names]
        if self.n > 1:
            parts.append(f"n={self.n} continuations are the same")
        if not parts:
            return None
        return f"{', '.join(parts)}: temperature={self.temperature:g} takes the likeliest token"

    def _whole_problems(self) -> list[str]:
        bounds: dict[str, tuple[int, int, str]] = {
            "max_new_tokens": (0, MOST_NEW_TOKENS, ""),
            "top_k": (0, MOST_COUNT, " (0: all tokens)"),
            "seed": (-(2**63), 2**64 - 1, ""),
            "n": (1, MOST_CONTINUATIONS, ""),
            "logprobs": (0, MOST_COUNT, ", or None"),
        }
        problems = []
        for name, (least, most, note) in bounds.items():
            value = getattr(self, name)
            if name == "logprobs" and value is None:
                continue
            if type(value) is not int or not least <= value <= most:
                # An end that nobody comes near but by mistake is told to nobody else.
                end = f" and at most {most}" if type(value) is int and value > most else ""
                problems.append(
                    f"{name}={value!r} must be a whole number of at least {least}{end}{note}"
                )
        return problems

    def _real_problems(self) -> list[str]:
        problems = []
        if _no_number(self.temperature, positive=True) or self.temperature < 0:
            problems.append(
                f"temperature={self.temperature} must be at least 0 (0: greedy), or from "
                f"{LEAST_REAL:g} to {MOST_REAL:g}"
            )
        if _no_number(self.top_p) or not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens)")
        if _no_number(self.min_p) or not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p} must be from 0 (all tokens) to 1")
        penalty = self.repetition_penalty
        if _no_number(penalty, positive=True) or penalty <= 0:
            problems.append(f"repetition_penalty={penalty} must be above 0 (1: none)")
        return problems

    def _stop_problems(self) -> list[str]:
        if isinstance(self.stop, str) or not all(isinstance(each, str) for each in self.stop):
            return [f"stop={self.stop!r} must be texts, such as ('\\n',)"]
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > MOST_STOPS:
            return [f"stop has {len(self.stop)} texts; allowed: at most {MOST_STOPS}"]
        return [
            f"stop={each[:40]!r} must have from 1 to {MOST_STOP_CHARACTERS} characters"
            for each in self.stop
            if not 1 <= len(each) <= MOST_STOP_CHARACTERS
        ]


def _no_number(value: object, *, positive: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return real_problem(value, positive=positive) is not None


@dataclass(frozen=True)
class Limits:
    """What an engine holds at a time: sizes of its states, fixed before the first token.

    Attributes:
        max_sequences: that are under way at once; each has one slot of Mamba's states.
        max_tokens: of all sequences under way, prompts and continuations, for which attention
            layers keep keys and values.
        prefill_tokens: of prompts that one step computes, beside a token of each other sequence.
        page_tokens: keys and values are kept in pages of so many tokens.
    """

    max_sequences: int = 16
    max_tokens: int = 65536
    prefill_tokens: int = 512
    page_tokens: int = 128

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} must be a whole number from 1 to {MOST_COUNT}"
            for name, value in vars(self).items()
            if type(value) is not int or not 1 <= value <= MOST_COUNT
        ]
        if problems:
            raise UserError("\n".join(problems))
