"""What a template that was written for other values makes of those of a conversation.

It raises nothing where it writes a list as Python would, JSON into JSON, or a call not at all: a
model would learn that.
"""

import json
from collections.abc import Iterator
from typing import Any

from megatron_hybrid.data.chat.conversation import Conversation
from megatron_hybrid.data.errors import DataError


def refuse_misrendered(conversation: Conversation, text: str) -> None:
    """Raises DataError where a rendered text has a message as nobody meant it."""
    tools = [name for name, _ in _calls(conversation.tools)]
    if tools and not any(name in text for name in tools):
        raise DataError(
            f"the chat template renders nothing of 'tools', as {tools[0]!r}; allowed: no 'tools', "
            "or a template that has them"
        )
    for number, message in enumerate(conversation.messages):
        content = message.get("content")
        if isinstance(content, list) and content and str(content) in text:
            raise DataError(
                f"message {number} (from 0): the chat template writes its content, a list of "
                "parts, as Python would; allowed: a string, or a template that knows parts"
            )
        calls = [*_calls(message.get("tool_calls")), *_calls([message.get("function_call")])]
        for name, arguments in calls:
            if problem := _problem(name, arguments, text):
                raise DataError(f"message {number} (from 0): {problem}")


def _problem(name: str, arguments: Any, text: str) -> str | None:
    if name not in text:
        return f"the chat template renders nothing of its call of {name!r}"
    what = f"the chat template writes the arguments of its call of {name!r}"
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        twice = (json.dumps(arguments, ensure_ascii=ascii) for ascii in (False, True))
        if any(each in text for each in twice):
            return f"{what}, JSON in a string, as a string in JSON; allowed: an object"
    elif isinstance(arguments, dict) and arguments and str(arguments) in text:
        return f"{what}, an object, as Python would; allowed: JSON in a string"
    return None


def _calls(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and arguments of calls, which come with `function` around them or without."""
    for call in value if isinstance(value, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            yield function["name"], function.get("arguments")
