"""Bodies of requests, as OpenAI's clients send them, to prompts and `SamplingParams`.

What is not known, or cannot be done, is refused by name; null is as if the field were not there.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.params import SamplingParams
from megatron_hybrid.generation.serving.chat import ChatPrompts, read_messages
from megatron_hybrid.generation.serving.refused import RefusedError

MOST_CHOICES, MOST_LOGPROBS = 128, 100
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "n")
_COMMON = {
    *_SAMPLING, "model", "stop", "stream", "stream_options", "max_tokens", "ignore_eos",
    "logprobs", "user",
}  # fmt: skip
_COMPLETIONS = {"prompt", "echo"}
_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
# Of OpenAI's, which clients send with the value that asks for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "store": (False,),
    "metadata": ({},), "service_tier": ("auto", "default"),
}  # fmt: skip
_NOTHING_COMPLETIONS: dict[str, tuple[Any, ...]] = {"suffix": ("",)}
_NOTHING_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none",),
    "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """What requests are read by.

    Attributes:
        name: of the model.
        defaults: of what a request does not say, but for the seed.
        seeds: of requests that have none, one after the other.
        encode: a text's tokens.
        problems: why the engine could never answer, a sentence each.
        chat: None, or why there is no chat.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    defaults: SamplingParams
    seeds: Iterator[int]
    encode: Callable[[str], list[int]]
    problems: Callable[[list[int], SamplingParams], list[str]]
    chat: ChatPrompts | str


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        texts: of the prompts, where they are to be echoed.
    """

    chat: bool
    prompts: list[list[int]]
    params: SamplingParams
    texts: list[str] | None
    stream: bool
    include_usage: bool


class _Fields:
    """The fields of a body, and what is wrong with them."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = {name: value for name, value in given.items() if value is not None}
        self.problems: list[tuple[str, str]] = []

    def refuse(self, name: str, message: str) -> None:
        self.problems.append((name, message))

    def flag(self, name: str) -> bool:
        value = self.given.get(name, False)
        if type(value) is not bool:
            self.refuse(name, f"{name}={value!r:.50} must be true or false")
        return value is True

    def whole(self, name: str, most: int) -> Any:
        """A whole number that has an end of the server's own; its type is for others to judge."""
        value = self.given.get(name)
        if type(value) is int and value > most:
            self.refuse(name, f"{name}={value} must be at most {most}")
        return value


def read_asked(content: Any, served: Served, *, chat: bool) -> Asked:
    """What a body asks for.

    Raises:
        RefusedError: naming all that is wrong with it.
    """
    if not isinstance(content, dict):
        raise RefusedError(400, "the body must be a JSON object")
    fields = _Fields(content)
    model = fields.given.get("model", served.name)
    if model != served.name:
        raise RefusedError(
            404, f"model={model!r:.200} is not served; allowed: {served.name!r}", param="model",
            code="model_not_found",
        )  # fmt: skip
    _refuse_unknown(fields, chat)
    stream = fields.flag("stream")
    include_usage = _include_usage(fields, stream)
    echo = fields.flag("echo") and not chat
    params = _params(fields, served, chat=chat, echo=echo)
    prompts = _chat_prompts(fields, served) if chat else _prompts(fields, served)
    if params is not None:
        for number, prompt in enumerate(prompts):
            where = f"prompt {number}: " if len(prompts) > 1 else ""
            for problem in served.problems(prompt, params):
                fields.refuse("messages" if chat else "prompt", where + _theirs(problem, chat)[1])
    if fields.problems or params is None:
        message = "\n".join(message for _, message in fields.problems)
        raise RefusedError(400, message, param=fields.problems[0][0])
    texts = None
    if echo:
        texts = _texts(fields.given["prompt"]) or [served.tokenizer.decode(p) for p in prompts]
    return Asked(chat, prompts, params, texts, stream, include_usage)


def _refuse_unknown(fields: _Fields, chat: bool) -> None:
    nothing = _NOTHING | (_NOTHING_CHAT if chat else _NOTHING_COMPLETIONS)
    if not chat:
        nothing["best_of"] = (fields.given.get("n", 1),)
    known = _COMMON | (_CHAT if chat else _COMPLETIONS)
    for name, value in fields.given.items():
        if name in nothing and value not in nothing[name]:
            allowed = " or ".join(repr(each) for each in nothing[name])
            fields.refuse(name, f"{name}={value!r:.50} is not supported; allowed: {allowed}")
        elif name not in nothing and name not in known:
            fields.refuse(
                name, f"unknown field {name[:100]!r}; allowed: {', '.join(sorted(known))}"
            )


def _include_usage(fields: _Fields, stream: bool) -> bool:
    options = fields.given.get("stream_options")
    if options is None:
        return False
    if (
        not isinstance(options, dict)
        or options.keys() - {"include_usage"}
        or type(options.get("include_usage", False)) is not bool
    ):
        fields.refuse(
            "stream_options",
            f"stream_options={options!r:.100} must be an object; allowed in it: include_usage, "
            "true or false",
        )
        return False
    if not stream:
        fields.refuse("stream_options", "stream_options needs stream=true")
    return options.get("include_usage") is True


def _params(fields: _Fields, served: Served, *, chat: bool, echo: bool) -> SamplingParams | None:
    given = fields.given
    own = {name: given[name] for name in _SAMPLING if name in given}
    # The same prompt sent again is to get another answer.
    own.setdefault("seed", next(served.seeds))
    fields.whole("n", MOST_CHOICES)
    stop = given.get("stop")
    if isinstance(stop, str | list):
        own["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    elif stop is not None:
        fields.refuse("stop", f"stop={stop!r:.50} must be a text or a list of texts")
    if "ignore_eos" in given:
        own["ignore_eod"] = fields.flag("ignore_eos")
    most = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if chat and len(most) == 2 and given[most[0]] != given[most[1]]:
        fields.refuse(most[0], "give one of max_tokens and max_completion_tokens")
    if most:
        own["max_new_tokens"] = given[most[-1] if chat else most[0]]
    if chat:
        top = fields.whole("top_logprobs", MOST_LOGPROBS)
        if fields.flag("logprobs"):
            own["logprobs"] = 0 if top is None else top
        elif top is not None:
            fields.refuse("top_logprobs", "top_logprobs needs logprobs=true")
    else:
        own["logprobs"] = fields.whole("logprobs", MOST_LOGPROBS)
    own["prompt_logprobs"] = echo and own.get("logprobs") is not None
    try:
        return replace(served.defaults, **own)
    except UserError as error:
        for line in str(error).splitlines():
            fields.refuse(*_theirs(line, chat))
        return None


def _theirs(problem: str, chat: bool) -> tuple[str, str]:
    """The field that a sentence begins with, and the sentence, with the names of OpenAI's."""
    problem = problem.replace("; max_tokens=", "; --max-tokens ")  # of the engine
    names = {"max_new_tokens": "max_tokens", "logprobs": "top_logprobs" if chat else "logprobs"}
    said = re.sub(r"\b(max_new_tokens|logprobs)=", lambda m: f"{names[m.group(1)]}=", problem)
    found = re.match(r"\w+", said)
    return found.group() if found else "", said


def _texts(prompt: Any) -> list[str]:
    """The texts of a prompt; none where it is of tokens."""
    if isinstance(prompt, str):
        return [prompt]
    return prompt if all(isinstance(each, str) for each in prompt) else []


def _prompts(fields: _Fields, served: Served) -> list[list[int]]:
    prompt: Any = fields.given.get("prompt")
    if _is_tokens(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and all(map(_is_tokens, prompt)):
        return prompt
    if not isinstance(prompt, str) and not (
        isinstance(prompt, list) and prompt and all(isinstance(each, str) for each in prompt)
    ):
        fields.refuse(
            "prompt",
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists",
        )
        return []
    found = []
    for text in _texts(prompt):
        try:
            found.append(served.encode(_whole_characters(text)))
        except UserError as error:
            fields.refuse("prompt", f"a prompt cannot be encoded: {error}")
    return found


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _chat_prompts(fields: _Fields, served: Served) -> list[list[int]]:
    if isinstance(served.chat, str):
        raise RefusedError(400, served.chat, param="messages", code="no_chat_template")
    settings = fields.given.get("chat_template_kwargs", {})
    if not isinstance(settings, dict):
        fields.refuse("chat_template_kwargs", "chat_template_kwargs must be an object")
        settings = {}
    messages, problems = read_messages(fields.given.get("messages"))
    for problem in problems:
        fields.refuse("messages", problem)
    if problems:
        return []
    try:
        for message in messages:
            for text in message.values():
                _whole_characters(text)
        return [served.chat.encode(messages, settings)]
    except UserError as error:
        said = str(error)
        name = "chat_template_kwargs"
        fields.refuse(name if said.startswith(name) else "messages", said)
        return []


def _whole_characters(text: str) -> str:
    """The text; UserError where it has no bytes in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"it holds half a character: {text[error.start]!r}") from None
    return text
