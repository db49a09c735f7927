"""Messages to the prompt of an answer, by the chat template of the tokenizer's files."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hybrid.data.chat.template import ChatTemplate
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizer.hugging_face import HuggingFaceTokenizer

ROLES = ("system", "user", "assistant")
_KEYS = ("role", "content", "name", "reasoning_content")


class ChatPrompts:
    """Renders and encodes conversations.

    Args:
        special_in_texts: let messages hold the texts of special tokens, which become their ids.

    Attributes:
        template_text: of the template.

    Raises:
        DataError: the tokenizer has no chat template, or one that is none.
    """

    def __init__(self, tokenizer: Tokenizer, *, special_in_texts: bool = False) -> None:
        templates = {}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            templates = tokenizer.chat_templates()
        if "default" not in templates or not isinstance(tokenizer, HuggingFaceTokenizer):
            raise DataError(
                "the model's tokenizer has no chat template (chat_template.jinja, or one in its "
                "tokenizer_config.json); allowed: prompts that are texts"
            )
        self.template_text = templates["default"]
        self._template = ChatTemplate(
            self.template_text, tokenizer.named_tokens(), "the chat template"
        )
        self._tokenizer = tokenizer.parsing_special_tokens()
        special = [] if special_in_texts else filter(None, tokenizer.special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, messages: Sequence[Any], settings: Mapping[str, Any]) -> list[int]:
        """The tokens before an answer; see `render`."""
        return self._tokenizer.encode(self.render(messages, settings))

    def render(
        self, messages: Sequence[Any], settings: Mapping[str, Any], *, answer: bool = True
    ) -> str:
        """The text before an answer, or before the rest of one that has begun.

        Args:
            messages: as `read_messages` gives them.
            settings: more variables of the template.
            answer: an answer is to follow; else the last message is to go on.

        Raises:
            DataError: the template refuses them, or a text holds a special token.
        """
        for number, message in enumerate(messages):
            for text in message.values():
                if found := self._special.search(text):
                    raise DataError(
                        f"messages[{number}] holds {found.group()!r}, a special token of the "
                        "tokenizer, which would control what it is only to say; "
                        "--parse-special-tokens lets it"
                    )
        text = self._template.render(messages, None, settings, prompts=answer).text
        if answer:
            return text
        begun = messages[-1]["content"].strip()
        end = text.rfind(begun) + len(begun)
        return text[:end]


def read_messages(value: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Messages as templates take them, all of text, and what is wrong with those given."""
    if not isinstance(value, list) or not value:
        return [], ["messages must be a list of at least one message"]
    messages, problems = [], []
    for number, each in enumerate(value):
        place = f"messages[{number}]"
        if not isinstance(each, dict):
            problems.append(f"{place} must be an object with 'role' and 'content'")
            continue
        message = {name: part for name, part in each.items() if part is not None}
        if isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"])
        for name in [name for name in message if name not in _KEYS]:
            problems.append(f"{place}.{name} is not supported; allowed: {', '.join(_KEYS)}")
        if message.get("role") not in ROLES:
            problems.append(
                f"{place}.role={message.get('role')!r:.50} is not supported; allowed: "
                f"{', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            problems.append(f"{place}.content must be a text, or a list of parts of type 'text'")
        for name in ("name", "reasoning_content"):
            if not isinstance(message.get(name, ""), str):
                problems.append(f"{place}.{name} must be a text")
        messages.append(message)
    return messages, problems


def _joined(parts: list[Any]) -> str | None:
    """The text of parts, a line each; None: not all of them are text."""
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    ]
    return "\n".join(texts) if parts and len(texts) == len(parts) else None
