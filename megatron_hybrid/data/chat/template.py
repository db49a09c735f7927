"""Chat templates: messages to text, as transformers renders them.

A template comes with a model, from whoever made it, so it runs in Jinja's sandbox, on plain values
of JSON. It may mark what the assistant says with `{% generation %}` … `{% endgeneration %}`, as
transformers has it; both rendered texts and marks are held against transformers by a test.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_hybrid.data.chat.conversation import Message
from megatron_hybrid.data.errors import DataError

_KEYWORD = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Around what is generated, while it is rendered: no text has these.
_BEGIN, _END = "\ufdd0generation\ufdd1", "\ufdd0endgeneration\ufdd1"
_MARK = re.compile(f"{_BEGIN}|{_END}")
# What a conversation is, whatever its settings say.
_CONVERSATION = ("messages", "tools", "add_generation_prompt")


class Rendered(NamedTuple):
    """A text, and the places `[begin, end)` in it that the template marks as generated."""

    text: str
    generated: list[tuple[int, int]]


class ChatTemplate:
    """A template, compiled.

    Args:
        text: Jinja.
        variables: what it may name besides the conversation, such as `bos_token`.
        name: where it is from, for messages.

    Attributes:
        marks_answers: whether it has `{% generation %}`.
        sha256: hex, of its text.

    Raises:
        DataError: it is no template.
    """

    def __init__(self, text: str, variables: Mapping[str, str], name: str) -> None:
        self.name = name
        self.marks_answers = _KEYWORD.search(text) is not None
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._variables = variables
        environment = _environment()
        try:
            self._template = environment.from_string(text)
            names = environment.parse(text).find_all(nodes.Name)
        except TemplateError as error:
            raise DataError(f"{name} is no Jinja template: {error}") from error
        self._read = {each.name for each in names if each.ctx == "load"} - {*_CONVERSATION}

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        prompts: bool = False,
    ) -> Rendered:
        """The text of messages.

        Args:
            tools: descriptions of functions.
            settings: more variables, before those of the tokenizer.
            prompts: end with the beginning of an assistant turn.

        Raises:
            DataError: the template refuses them, or cannot render them, or reads nothing of a
                setting.
        """
        for name, value in (settings or {}).items():
            if value is not None and name not in self._read:
                raise DataError(f"chat_template_kwargs.{name}: the chat template reads none")
        known = {"documents": None, **self._variables, **(settings or {})}
        known |= {"messages": list(messages), "tools": tools, "add_generation_prompt": prompts}
        try:
            marked = self._template.render(known)
        except TemplateError as error:
            raise DataError(f"the chat template refuses it: {error}") from error
        except Exception as error:  # whatever its expressions come to
            kind = type(error).__name__
            raise DataError(f"the chat template cannot render it: {kind}: {error}") from error
        return _without_marks(marked)


def _without_marks(marked: str) -> Rendered:
    parts: list[str] = []
    generated: list[tuple[int, int]] = []
    place = done = begin = 0
    for mark in _MARK.finditer(marked):
        parts.append(marked[done : mark.start()])
        place, done = place + mark.start() - done, mark.end()
        if mark.group() == _BEGIN:
            begin = place
        else:
            generated.append((begin, place))
    return Rendered("".join([*parts, marked[done:]]), generated)


class _Generation(Extension):
    """The keyword `generation`."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class _Names(Namespace):
    """Jinja's namespace without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r} in a chat template")
        super().__setitem__(name, value)


def _namespace(*values: Any, **named: Any) -> Namespace:
    names = _Names()
    for name, value in dict(*values, **named).items():
        names[name] = value
    return names


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape what HTML does not take."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)
