"""A conversation as a line of JSON has it: `messages`, or `prompt` and `completion`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.json_text import TOO_DEEP, is_too_deep, parse_json

ROLES = ("system", "user", "assistant", "tool")
# What a message says, each by itself enough; reasoning has gone by several names.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_SAYS = ("content", "tool_calls", *_REASONING)
# Whether a message is learnt, as OpenAI's, ms-swift's and axolotl's files say it.
_WEIGHTS = ("weight", "loss", "train")

# Beside the messages, and where they are read.
_BESIDE = {
    "system": "a first message with the role system",
    "functions": "'tools'",
}

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, checked, as templates take them.

    Attributes:
        messages: with the keys of the line, those left out that are null.
        given: the first so many are a prompt: of them nothing is learnt, whoever speaks.
        tools: descriptions of functions, for the template; None: none.
        settings: what else the template is to be told.
    """

    messages: tuple[Message, ...]
    given: int = 0
    tools: list[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """The messages that a model is to learn, by their numbers."""
        return [number for number in self._turns if _is_learnt(self.messages[number])]

    @property
    def left_out(self) -> list[int]:
        """Turns of the assistant, none of the prompt's, that say that they are not to be learnt."""
        return [number for number in self._turns if not _is_learnt(self.messages[number])]

    @property
    def _turns(self) -> list[int]:
        return [
            number
            for number, message in enumerate(self.messages)
            if number >= self.given and message["role"] == "assistant"
        ]


def parse(record: Mapping[str, Any]) -> Conversation:
    """The conversation that an object of JSON holds.

    Raises:
        DataError: it holds none, or one of which nothing can be learnt.
    """
    if is_too_deep(record):
        raise DataError(TOO_DEEP)
    if "messages" in record:
        given, messages = 0, _messages("messages", record["messages"], "user")
    elif "prompt" in record and "completion" in record:
        prompt = _messages("prompt", record["prompt"], "user")
        given = len(prompt)
        messages = [*prompt, *_messages("completion", record["completion"], "assistant")]
    else:
        raise DataError("there is no key 'messages', nor 'prompt' and 'completion'")
    _refuse_unread(record, messages)
    conversation = Conversation(
        tuple(messages), given, _tools(record), _object(record, "chat_template_kwargs")
    )
    if not conversation.answers:
        of = " that is to be learnt" if conversation.left_out else ""
        raise DataError(f"it has no assistant turn{of}: there is nothing to learn")
    return conversation


def _refuse_unread(record: Mapping[str, Any], messages: list[Message]) -> None:
    """Refuse what other programs have beside the messages and make part of the text."""
    for name in _BESIDE:
        if (said := record.get(name)) and said not in [each.get("content") for each in messages]:
            raise DataError(
                f"{name!r} is {_shown(said)}, which is not read beside the messages; allowed: "
                f"{_BESIDE[name]}"
            )


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from texts_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)


def _messages(key: str, value: Any, role: str) -> list[Message]:
    """The messages below a key; a text is one of `role`."""
    if isinstance(value, str):
        if key == "messages":
            raise DataError("'messages' is a string, not a list of messages")
        value = [{"role": role, "content": value}]
        return [_message(key, value[0])]
    if not isinstance(value, list) or not value:
        raise DataError(f"{key!r} must be a list of messages; it is {_shown(value)}")
    return [_message(f"{key}[{number}]", each) for number, each in enumerate(value)]


def _message(place: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} must be an object with 'role' and 'content'; it is a {_kind(value)}"
        )
    message = {name: each for name, each in value.items() if each is not None}
    role = message.get("role")
    if role not in ROLES:
        said = "is missing" if role is None else f"is {_shown(role)}"
        raise DataError(f"{place}.role {said}; allowed: {', '.join(ROLES)}")
    if not any(name in message for name in _SAYS):
        raise DataError(f"{place} ({role}) has no content")
    if not isinstance(message.get("content", ""), str | list):
        raise DataError(f"{place}.content must be a string or a list of parts")
    if role == "assistant" and not any(_says(message[name]) for name in _SAYS if name in message):
        raise DataError(f"{place} is an empty assistant turn: there is nothing to learn")
    for name in _WEIGHTS:
        if name in message and message[name] not in (0, 1):
            raise DataError(f"{place}.{name} is {_shown(message[name])}; allowed: 0, 1")
        if message.get(name) == 1 and role != "assistant":
            raise DataError(
                f"{place}.{name} is {_shown(message[name])}, and the role {role}: only what the "
                "assistant says is learnt; allowed: 0"
            )
    for name in _REASONING:
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _is_learnt(message: Message) -> bool:
    return all(message.get(name, 1) for name in _WEIGHTS)


def _says(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """Tables have no place for objects of all shapes: there they are JSON in a text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"'tools' is a text, and no JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"'tools' must be a list; it is a {_kind(tools)}")
    return tools or None


def _object(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = record.get(key)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{key!r} must be an object; it is a {_kind(value)}")
    return value or {}


def _kind(value: Any) -> str:
    names = {str: "string", bool: "boolean", dict: "object", list: "list", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
