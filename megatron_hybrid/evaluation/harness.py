"""lm-eval's view of a model: what its tasks ask is answered by a `Generator`.

Only here is lm-eval imported. What its own model of transformers does with a request is done here,
too, so that both give the same figures: where a text begins, what is cut off, what ends an answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation import Generator, SamplingParams, TokenLogprob
from megatron_hybrid.generation.serving.chat import ChatPrompts

_MOST_NEW_TOKENS = 256  # of an answer whose task does not say
# What a task may say of its answers, and how it is called here.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_READ = {"do_sample", "until", "max_gen_toks", *_SAMPLING}


@dataclass(frozen=True)
class _Scored:
    """A continuation that is asked for.

    Attributes:
        number: among those that are asked for.
        context, continuation: tokens.
    """

    number: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class HarnessModel(TemplateLM):
    """A model for lm-eval.

    Args:
        max_length: tokens of a text at most; a longer one loses its beginning.
        generator: on the rank that leads; None: nothing is asked, only `check`ed.
        parse_special_tokens: chat messages may hold the text of special tokens.
        told: called with the requests that are done and all there are, of a kind.

    Attributes:
        answering: requests are under way, rather than what lm-eval does before and after.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        generator: Generator | None = None,
        *,
        parse_special_tokens: bool = False,
        told: Callable[[str, int, int], None] = lambda kind, done, total: None,
    ) -> None:
        super().__init__()
        self._tokenizer, self._generator = tokenizer, generator
        self.max_length, self._told = max_length, told
        self.answering = False
        self._special_in_texts = parse_special_tokens
        self._chat: ChatPrompts | None = None

    # -- what lm-eval asks of a model --------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows: as for transformers, the first token, if any."""
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            first = self._tokenizer.special_id("bos_token")
            if first is not None:
                return first
        return self._tokenizer.eod

    @property
    def tokenizer_name(self) -> str:
        """In the names of requests that are kept, as none are."""
        return ""

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, to which nothing is added."""
        return self._tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for lm-eval's record of it."""
        return self._chats().template_text if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._chats().render(chat_history, {}, answer=add_generation_prompt)

    def check(self, kind: str, arguments: tuple[Any, ...]) -> None:
        """Look at a request without an answer to it; encoded only where that may tell something.

        Raises:
            UserError: it cannot be asked.
        """
        if kind == "generate_until":
            self._sampling(arguments[1], 0)
        elif kind == "loglikelihood":
            context, continuation = arguments
            likely = context.strip() and continuation.strip()
            if not likely or len(continuation.encode()) > self.max_length:
                self._pair(context, continuation)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self._loglikelihood_tokens(
            [(each.args, *self._pair(*each.args)) for each in requests]
        )

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; of a continuation without a context the prefix is one, or its first."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            after = self.tok_encode(continuation, add_special_tokens=False)
            begins = after[:1] == [self.prefix_token_id]
            before, after = (after[:1], after[1:]) if begins else ([self.prefix_token_id], after)
        if not before:
            raise UserError(
                f"the context {context!r:.50} is of blanks alone; allowed: none at all, or a text"
            )
        if not after:
            raise UserError(
                f"the continuation {continuation!r:.50} has no token of its own after the context "
                f"{context[-20:]!r}; allowed: at least one"
            )
        if len(after) > self.max_length:
            raise UserError(
                f"a continuation of {len(after)} tokens has no room for a context; allowed: at "
                f"most data.seq_length={self.max_length}"
            )
        return before, after

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding would give it."""
        asked = [
            self._scored(number, context, continuation)
            for number, (_, context, continuation) in enumerate(requests)
        ]
        together: dict[tuple[int, ...], list[_Scored]] = {}
        for each in asked:
            together.setdefault(each.context, []).append(each)
        groups = list(together.values())
        with self._asked() as generator:
            scores = generator.score(
                ((group[0].context, [each.continuation for each in group]) for group in groups),
                top=1,
                told=self._counter("loglikelihood", len(asked)),
            )
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        for group, found in zip(groups, scores, strict=True):
            for each, tokens in zip(group, found, strict=True):
                answers[each.number] = _answer(each.continuation, tokens)
        return answers

    def _scored(self, number: int, context: list[int], continuation: list[int]) -> _Scored:
        """As far as the model's length goes: the last token needs no room."""
        room = self.max_length + 1 - len(continuation)
        return _Scored(number, tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap, each after one token of context."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            own = [(None, *make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to what ends them, which is not part of them."""
        prompts, params = [], []
        for number, request in enumerate(requests):
            context, settings = request.args
            asked = self._sampling(settings, number)
            room = self.max_length - asked.max_new_tokens
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            params.append(asked)
        told = self._counter("generate_until", len(prompts))
        with self._asked() as generator:
            answers = generator.generate(prompts, params, told=told)
        return [completion.text or "" for [completion] in answers]

    def _sampling(self, settings: Mapping[str, Any], number: int) -> SamplingParams:
        said = dict(normalize_gen_kwargs(dict(settings), _MOST_NEW_TOKENS))
        if unknown := sorted(said.keys() - _READ):
            raise UserError(
                f"generation_kwargs.{unknown[0]}={said[unknown[0]]!r:.50} is not supported; "
                f"allowed: {', '.join(sorted(_READ))}"
            )
        if said["max_gen_toks"] >= self.max_length:
            raise UserError(
                f"an answer of max_gen_toks={said['max_gen_toks']} has no room for a context; "
                f"allowed: less than data.seq_length={self.max_length}"
            )
        own = {name: said[name] for name in _SAMPLING if name in said}
        if not said["do_sample"]:
            own["temperature"] = 0.0
        return SamplingParams(
            max_new_tokens=said["max_gen_toks"],
            # Of a task that samples, each repetition is a draw of its own.
            seed=SamplingParams.seed + number,
            stop=tuple(each for each in said["until"] if each),
            **own,
        )

    @contextmanager
    def _asked(self) -> Iterator[Generator]:
        assert self._generator is not None, "one that only checks is asked nothing"
        self.answering = True
        yield self._generator
        self.answering = False

    def _counter(self, kind: str, total: int) -> Callable[[], None]:
        done = 0

        def told() -> None:
            nonlocal done
            done += 1
            self._told(kind, done, total)

        return told

    def _chats(self) -> ChatPrompts:
        if self._chat is None:
            self._chat = ChatPrompts(self._tokenizer, special_in_texts=self._special_in_texts)
        return self._chat


def _answer(tokens: Sequence[int], found: Sequence[TokenLogprob]) -> tuple[float, bool]:
    greedy = all(token == each.top[0][0] for token, each in zip(tokens, found, strict=True))
    return sum(each.logprob for each in found), greedy
