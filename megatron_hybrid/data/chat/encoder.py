"""Conversations to ids, each with whether it is learnt: what the assistant said, and only that.

Where the template marks what is generated, as transformers' `return_assistant_tokens_mask` has it.
Where not, a turn is what the template adds from the beginning of an assistant turn (its generation
prompt) to the end of that turn: the difference of two renderings, of which one begins as the other.
"""

import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_hybrid.data.chat.conversation import Conversation, parse, texts_of
from megatron_hybrid.data.chat.misrendered import refuse_misrendered
from megatron_hybrid.data.chat.template import ChatTemplate
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import masked_dtype
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.tokenizer.hugging_face import HuggingFaceTokenizer

_HALF = re.compile(r"[\ud800-\udfff]")
_PROBE = "\ufdd0"  # as a content: begins as no other does


class ChatEncoder:
    """Turns objects of JSON into ids.

    Args:
        tokenizer: one that makes ids of the texts of special tokens, as templates write them.
        template_path: of a file, in place of the tokenizer's own template.
        special_in_texts: let messages hold the texts of special tokens, which become their ids.

    Attributes:
        sha256: of the template, hex.

    Raises:
        DataError: the tokenizer has no chat template, or one that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template_path: Path | None = None,
        special_in_texts: bool = False,
    ) -> None:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise DataError(
                "--chat needs --tokenizer-type huggingface: others have neither a chat template "
                "nor special tokens in texts"
            )
        self._tokenizer = tokenizer
        self._dtype = masked_dtype(tokenizer.vocab_size)
        variables = tokenizer.named_tokens()
        self._templates = {
            name: ChatTemplate(text, variables, name)
            for name, text in _templates(tokenizer, template_path).items()
        }
        self.sha256 = self._templates["default"].sha256
        special = (
            [] if special_in_texts else sorted(tokenizer.special_tokens, key=len, reverse=True)
        )
        self._special = re.compile("|".join(map(re.escape, filter(None, special))) or r"(?!)")

    def encode(self, record: Mapping[str, Any]) -> NDArray[Any]:
        """The tokens of a conversation, `[n]` of `masked_dtype`.

        Raises:
            DataError: it is no conversation, or the template does not say what of it is learnt.
        """
        conversation = parse(record)
        for text in texts_of([conversation.messages, conversation.tools, conversation.settings]):
            if half := _HALF.search(text):
                raise DataError(
                    f"a text holds half a character, the lone surrogate \\u{ord(half.group()):04x}"
                )
            if found := self._special.search(text):
                raise DataError(
                    f"a text holds {found.group()!r}, a special token of the tokenizer, which "
                    "would control what it is only to say; --parse-special-tokens lets it"
                )
        text, spans = self._spans(conversation)
        refuse_misrendered(conversation, text)
        ids, places = self._tokenizer.encode_with_places(text)
        tokens = np.zeros(len(ids), dtype=self._dtype)
        tokens["id"] = ids
        tokens["learnt"] = _overlapping(places, spans)
        # Of the first token nothing is predicted.
        if not tokens["learnt"][1:].any():
            raise DataError("the chat template renders nothing of its assistant turns")
        return tokens

    def _spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the places in it that are learnt."""
        kind = "tool_use" if conversation.tools and "tool_use" in self._templates else "default"
        template = self._templates[kind]
        whole = _Renderer(template, conversation)
        if not template.marks_answers:
            return whole.text, [whole.answer(number) for number in conversation.answers]
        spans = whole.generated
        if any(
            message["role"] == "assistant"
            for message in conversation.messages[: conversation.given]
        ):
            begin = whole.prompt_end()
            spans = [span for span in spans if span[0] >= begin]
        for number in conversation.left_out:
            begin, end = whole.turn(number)
            spans = [span for span in spans if span[1] <= begin or span[0] >= end]
        return whole.text, spans


class _Renderer:
    """The renderings of one conversation, whole and in parts."""

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self._template, self._conversation = template, conversation
        self.text, self.generated = self._template.render(
            conversation.messages, conversation.tools, conversation.settings
        )

    def answer(self, number: int) -> tuple[int, int]:
        """Where the turn of message `number` is learnt, by prefixes."""
        messages = self._conversation.messages
        last = number == len(messages) - 1
        through = self.text if last else self._part(*messages[: number + 1])
        if not self.text.startswith(through):
            raise self._other(number)
        prompt = self._part(*messages[:number], prompts=True)
        if through.startswith(prompt):
            return len(prompt), len(through)
        # The prompt goes on, as with `<think>`, otherwise than this turn.
        probe = self._part(*messages[:number], {**messages[number], "content": _PROBE})
        begin = _common(prompt, through, probe)
        before = self._part(*messages[:number])
        if not prompt.startswith(before) or begin < len(before):
            raise self._other(number)
        return begin, len(through)

    def prompt_end(self) -> int:
        """Where what was given ends."""
        return self._end(self._conversation.given)

    def turn(self, number: int) -> tuple[int, int]:
        """Where message `number` is, as the template begins and ends it."""
        return self._end(number), self._end(number + 1)

    def _end(self, count: int) -> int:
        """Where the first `count` messages end."""
        if not count or count == len(self._conversation.messages):
            return len(self.text) if count else 0
        part = self._part(*self._conversation.messages[:count])
        if not self.text.startswith(part):
            raise self._other(count - 1)
        return len(part)

    def _part(self, *messages: Mapping[str, Any], prompts: bool = False) -> str:
        about = self._conversation
        return self._template.render(messages, about.tools, about.settings, prompts=prompts).text

    def _other(self, number: int) -> DataError:
        return DataError(
            f"message {number} (from 0) is rendered otherwise by the chat template where more "
            "follows it, so that what is learnt of it cannot be told; a template that marks it "
            "with {% generation %} can be given as --chat-template"
        )


def _common(*texts: str) -> int:
    """How many characters texts have in common at their beginnings."""
    same = (len(set(each)) == 1 for each in zip(*texts, strict=False))
    return sum(takewhile(bool, same))


def _overlapping(places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of tokens, at `places` in their order, share a character with one of the spans."""
    found = np.zeros(len(places), dtype=np.bool_)
    begins, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    for begin, end in spans:
        found |= (begins < end) & (ends > begin)
    return found


def _templates(tokenizer: HuggingFaceTokenizer, path: Path | None) -> dict[str, str]:
    """Templates by name."""
    if path is not None:
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--chat-template {path} cannot be read: {error}") from error
    found = tokenizer.chat_templates()
    if "default" not in found:
        named = f"; it has {', '.join(found)}" if found else ""
        raise DataError(
            "--chat needs a chat template: --tokenizer-model has no chat_template.jinja beside "
            f"its tokenizer.json, nor one in tokenizer_config.json{named}; allowed: "
            "--chat-template FILE"
        )
    return found
