"""Events of the engine to what OpenAI's clients read, whole or piece by piece."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.generation.request import Event, TokenLogprob
from megatron_hybrid.generation.serving.asked import Asked, Served
from megatron_hybrid.generation.text import TextStream

Events = Iterator[tuple[int, Event]]
_FINISH = {"eod": "stop", "stop": "stop", "length": "length"}
# What stands for -inf, which JSON has not.
_LEAST = -9999.0


@dataclass(frozen=True)
class Told:
    """A token with its log-probability, None for a text's first; and where its text begins."""

    text: str
    logprob: float | None
    top: list[tuple[str, float]]
    offset: int


@dataclass
class Piece:
    """What an event adds to a choice."""

    text: str
    told: list[Told] = field(default_factory=list)
    finish: str | None = None


class _Teller:
    """Tokens of one text, as they come, with their log-probabilities.

    Args:
        before: tokens before them.
        offset: where their text begins.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], offset: int) -> None:
        self._tokenizer, self._last, self._offset = tokenizer, list(before[-1:]), offset
        self._text = TextStream(tokenizer, before)

    def tell(self, token: int, logprob: TokenLogprob | None) -> Told:
        offset = self._offset + len(self._text.text)
        pairs = () if logprob is None else logprob.top
        own, *texts = self._texts([token, *(each for each, _ in pairs)])
        self._last = [token]
        self._text.add(token)
        top = [(text, max(value, _LEAST)) for text, (_, value) in zip(texts, pairs, strict=True)]
        return Told(own, None if logprob is None else max(logprob.logprob, _LEAST), top, offset)

    def _texts(self, tokens: list[int]) -> list[str]:
        """As they read after the last; `token_id:N` of one that is part of a character."""
        head, texts = self._tokenizer.decode(self._last), []
        for token in tokens:
            whole = self._tokenizer.decode([*self._last, token])
            text = whole[len(head) :] if whole.startswith(head) else ""
            texts.append(
                text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token}"
            )
        return texts


class _Choice:
    """One continuation of one prompt."""

    def __init__(self, asked: Asked, tokenizer: Tokenizer, prompt: int) -> None:
        self._prompt, self._tokenizer = asked.prompts[prompt], tokenizer
        self._echo = None if asked.texts is None else asked.texts[prompt]
        self._text = TextStream(tokenizer, self._prompt, asked.params.stop)
        self._teller = _Teller(tokenizer, self._prompt, len(self._echo or ""))
        self.tokens = 0

    def add(self, event: Event, prompt: Sequence[TokenLogprob | None] | None) -> Piece:
        """What an event adds; the first begins with the prompt, if it is to be echoed."""
        piece = Piece("")
        if self._echo is not None:
            piece.text, self._echo = self._echo, None
            if prompt is not None:
                teller = _Teller(self._tokenizer, [], 0)
                pairs = zip(self._prompt, prompt, strict=True)
                piece.told = [teller.tell(token, logprob) for token, logprob in pairs]
        if event.token is not None:
            self.tokens += 1
            if event.logprob is not None:
                piece.told.append(self._teller.tell(event.token, event.logprob))
            if event.end != "eod":
                piece.text += self._text.add(event.token)
        if event.end is not None:
            piece.text += self._text.finish()
            piece.finish = _FINISH[event.end]
        return piece


class Answer:
    """The answer to one request."""

    def __init__(self, asked: Asked, served: Served) -> None:
        self._asked = asked
        n = asked.params.n
        self._choices = [
            _Choice(asked, served.tokenizer, prompt)
            for prompt in range(len(asked.prompts))
            for _ in range(n)
        ]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprob | None]] = {}
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if asked.chat else "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    def whole(self, events: Events) -> dict[str, Any]:
        """All of it."""
        wholes = [Piece("") for _ in self._choices]
        for index, piece in self._pieces(events):
            whole = wholes[index]
            whole.text += piece.text
            whole.told += piece.told
            whole.finish = piece.finish
        choices = []
        for index, whole in enumerate(wholes):
            said: dict[str, Any] = {"text": whole.text}
            if self._asked.chat:
                said = {"message": {"role": "assistant", "content": whole.text}}
            choices.append(self._choice(index, whole, said))
        return {**self._head, "choices": choices, "usage": self._usage()}

    def chunks(self, events: Events) -> Iterator[dict[str, Any]]:
        """Piece by piece."""
        head: dict[str, Any] = dict(self._head)
        said: dict[str, Any]
        usage: dict[str, Any] = {"usage": None} if self._asked.include_usage else {}
        if self._asked.chat:
            head["object"] = "chat.completion.chunk"
            for index in range(len(self._choices)):
                said = {"delta": {"role": "assistant", "content": ""}}
                yield {**head, "choices": [self._choice(index, Piece(""), said)], **usage}
        for index, piece in self._pieces(events):
            if piece.text or piece.told or piece.finish:
                said = {"text": piece.text}
                if self._asked.chat:
                    said = {"delta": {"content": piece.text} if piece.text else {}}
                yield {**head, "choices": [self._choice(index, piece, said)], **usage}
        if self._asked.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    def _pieces(self, events: Events) -> Iterator[tuple[int, Piece]]:
        n = self._asked.params.n
        for prompt, event in events:
            if event.prompt_logprobs is not None:
                self._prompt_logprobs[prompt] = event.prompt_logprobs
            index = prompt * n + event.continuation
            yield index, self._choices[index].add(event, self._prompt_logprobs.get(prompt))

    def _choice(self, index: int, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._asked.params.logprobs is not None and piece.told:
            logprobs = (_of_chat if self._asked.chat else _of_completions)(piece.told)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": piece.finish}

    def _usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._asked.prompts))
        completion = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _of_completions(told: list[Told]) -> dict[str, Any]:
    tops: list[dict[str, float] | None] = []
    for each in told:
        if each.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for text, value in [*each.top, (each.text, each.logprob)]:
            top.setdefault(text, value)
        tops.append(top)
    return {
        "tokens": [each.text for each in told],
        "token_logprobs": [each.logprob for each in told],
        "top_logprobs": tops,
        "text_offset": [each.offset for each in told],
    }


def _of_chat(told: list[Told]) -> dict[str, Any]:
    def one(text: str, logprob: float | None) -> dict[str, Any]:
        whole = None if text.startswith("token_id:") else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}

    content = [
        {**one(each.text, each.logprob), "top_logprobs": [one(*pair) for pair in each.top]}
        for each in told
    ]
    return {"content": content, "refusal": None}
