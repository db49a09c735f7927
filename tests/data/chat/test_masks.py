"""Which tokens of a conversation are learnt: as transformers says, and by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.data.chat import ChatEncoder
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.tokenizer import Tokenizer
from tests.data.chat.templates import (
    CHATML,
    LLAMA,
    MARKED_CHATML,
    MARKED_LLAMA,
    MARKED_NEMOTRON,
    NEMOTRON,
    tokenizer_folder,
    tokenizer_for_chats,
)
from tests.mutations.changes import change_value


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": '<b>Sums</b> "two"'}}]
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": turns("Hello", "Hi there!", "  1+1?\n", " 2 ", system="Be brief")},
    {"messages": turns("naïve 東京 🙂?", "🙂 café\n\n東京 👩‍👩‍👧", "more", "x")},
    {"messages": turns("def f(x):", "    return x\n")},
]
WITH_TOOLS = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "1 + é?"},
        {"role": "assistant", "content": None, "reasoning": "It sums.", "tool_calls": CALL},
        {"role": "tool", "content": "1é", "name": None},
        {"role": "assistant", "content": "It is 1é."},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return tokenizer_for_chats(folder)


def encoder(tokenizer: Tokenizer, template: str, folder: Path) -> ChatEncoder:
    (folder / "given.jinja").write_text(template)
    return ChatEncoder(tokenizer, folder / "given.jinja")


@pytest.mark.parametrize(
    ("template", "more"),
    [(MARKED_CHATML, [WITH_TOOLS]), (MARKED_LLAMA, []), (MARKED_NEMOTRON, [])],
    ids=["chatml", "llama", "nemotron"],
)
def test_marked_templates(
    template: str, more: list[dict[str, Any]], tokenizer: Tokenizer, folder: Path, tmp_path: Path
) -> None:
    """Ids and masks are those of transformers, whatever is said, called and thought."""
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = encoder(tokenizer, template, tmp_path)
    for record in [*CONVERSATIONS, *more]:
        found = ours.encode(record)
        expected = peer.apply_chat_template(
            record["messages"], tools=record.get("tools"), chat_template=template,
            return_dict=True, return_assistant_tokens_mask=True,
        )  # fmt: skip
        assert found["id"].tolist() == expected["input_ids"]
        assert found["learnt"].tolist() == expected["assistant_masks"]
        assert 0 < found["learnt"].sum() < len(found)


def learnt_texts(found: Any, tokenizer: Tokenizer) -> list[str]:
    """The stretches that are learnt, as text."""
    parts: list[list[int]] = []
    before = False
    for token, learnt in zip(found["id"].tolist(), found["learnt"].tolist(), strict=True):
        if learnt and not before:
            parts.append([])
        if learnt:
            parts[-1].append(token)
        before = learnt
    return [tokenizer.decode(part) for part in parts]


THOUGHT = turns("1+1?", "<think>Easy</think>2", "<b>?", "<table>")
GIVEN = {"prompt": turns("a", "b", "c"), "completion": "d"}


@pytest.mark.parametrize(
    ("template", "record", "learnt"),
    [
        (CHATML, CONVERSATIONS[0], ["Hi there!<|im_end|>\n", " 2 <|im_end|>\n"]),
        (CHATML, {"messages": turns("a", "b", system="s")}, ["b<|im_end|>\n"]),
        (CHATML, {"messages": [*turns("a", "b"), *turns("", "c")[1:]]},  # one after the other
         ["b<|im_end|>\n", "c<|im_end|>\n"]),
        (CHATML, {"prompt": "a", "completion": "b"}, ["b<|im_end|>\n"]),
        (CHATML, GIVEN, ["d<|im_end|>\n"]),
        (MARKED_CHATML, GIVEN, ["d<|im_end|>"]),
        (LLAMA, CONVERSATIONS[0], ["Hi there!</s>", "2</s>"]),
        # The prompt goes on with <think>, which no turn does: what follows the same beginning.
        (NEMOTRON, {"messages": THOUGHT}, ["2\n<|im_end|>\n", "<table>\n<|im_end|>\n"]),
        (NEMOTRON, {"messages": turns("a /no_think", "b")}, ["b\n<|im_end|>\n"]),
    ],
)  # fmt: skip
def test_by_hand(
    template: str, record: dict[str, Any], learnt: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Without marks: from the end of what a turn begins with, to the end of the turn. Of a prompt
    nothing is learnt, though the assistant speaks in it."""
    found = encoder(tokenizer, template, tmp_path).encode(record)
    assert learnt_texts(found, tokenizer) == learnt


WEIGHED = [{"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"},
           {"role": "assistant", "content": "d", "loss": True}, {"role": "user", "content": "e"},
           {"role": "assistant", "content": "f", "train": False}]  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, LLAMA, MARKED_LLAMA])
@pytest.mark.parametrize("prompt", [True, False])
def test_turns_that_say_that_they_are_not_learnt(
    template: str, prompt: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As files of others say it; the first turn of a conversation, or one in the middle."""
    messages = [{"role": "user", "content": "a", "weight": 0}, *WEIGHED]
    found = encoder(tokenizer, template, tmp_path).encode({"messages": messages[not prompt :]})
    (learnt,) = learnt_texts(found, tokenizer)
    assert learnt.strip().removesuffix("<|im_end|>").removesuffix("</s>") == "d"


# The last turn alone has an end; so the first is rendered in two ways.
ENDS_ONCE = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}{{ eos_token }}"
ONE = turns("a", "b")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other keys": ({"text": "a"}, "there is no key 'messages', nor 'prompt' and 'completion'"),
    "no list": ({"messages": "a"}, "'messages' is a string, not a list of messages"),
    "empty": ({"messages": []}, r"'messages' must be a list of messages; it is \[\]"),
    "no object": ({"messages": ["a"]}, r"messages\[0\] must be an object .*; it is a string"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\].role is missing; allowed: syst"),
    "unknown role": (
        {"messages": [*ONE, {"role": "bot", "content": "c"}]},
        r"messages\[2\].role is \"bot\"; allowed: system, user, assistant, tool",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] \(user\) has no content"),
    "a number": ({"messages": [{"role": "user", "content": 5}]}, "must be a string or a list"),
    "no assistant": ({"messages": ONE[:1]}, "it has no assistant turn: there is nothing to learn"),
    "empty turn": ({"messages": turns("a", " \n")}, r"messages\[1\] is an empty assistant turn"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is an empty assistant"),
    "no completion": ({"prompt": "a", "completion": turns("b")}, "has no assistant turn"),
    "none learnt": (
        {"messages": [ONE[0], {**ONE[1], "weight": 0}]},
        "no assistant turn that is to be learnt",
    ),
    "half a weight": (
        {"messages": [ONE[0], {**ONE[1], "weight": 0.5}]},
        r"messages\[1\].weight is 0.5; allowed: 0",
    ),
    "a user's weight": (
        {"messages": [{**ONE[0], "loss": True}, ONE[1]]},
        "loss is true, and the role user: only wh",
    ),
    "tools": ({"messages": ONE, "tools": "{"}, "'tools' is a text, and no JSON"),
    "settings": ({"messages": ONE, "chat_template_kwargs": [1]}, "must be an object; it is a list"),
    "too deep": ({"messages": ONE, "x": json.loads("[" * 500 + "]" * 500)}, "nested more than 64"),
    "half": ({"messages": turns("a\ud83d", "b")}, r"half a character, the lone surrogate \\ud83d"),
    "special": ({"messages": turns("a</s>", "b")}, "a text holds '</s>', a special token"),
    "unread setting": (
        {"messages": ONE, "chat_template_kwargs": {"set": None, "thinks": False}},
        "chat_template_kwargs.thinks: the chat template reads none",
    ),
    "setting of ours": (
        {"messages": ONE, "chat_template_kwargs": {"add_generation_prompt": True}},
        "chat_template_kwargs.add_generation_prompt: the chat template reads none",
    ),
    "system beside": (
        {"messages": ONE, "system": "Be brief."},
        "'system' is \"Be brief.\", which is",
    ),
    "functions beside": (
        {"prompt": "a", "completion": "b", "functions": [{"name": "add"}]},
        "allowed: 'tools'",
    ),
    "an older call": (
        {"messages": [ONE[0], {**ONE[1], "function_call": {"name": "add", "arguments": "{}"}}]},
        "message 1 .from 0.: the chat template renders nothing of its call of 'add'",
    ),
    "refused": ({"messages": [*ONE, ONE[1]]}, "the chat template refuses it: Roles must alternate"),
    "fails": (
        {"messages": [*turns("a", "b"), {"role": "user", "content": [{"text": "c"}]}]},
        "the chat template cannot render it: TypeError: can only concatenate str",
    ),
}


@pytest.mark.parametrize(("record", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(
    record: dict[str, Any], reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of which nothing could be learnt, or not what it says: a reason each."""
    template = MARKED_LLAMA if "alternate" in reason else CHATML
    with pytest.raises(DataError, match=reason):
        encoder(tokenizer, template, tmp_path).encode(record)


def call(arguments: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
    return {"messages": [ONE[0], {"role": "assistant", "content": "", "tool_calls": calls}]}


PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}, ONE[1]]}
# Of messages: all that one may print, and their calls with arguments as they are, or as JSON.
_ALL = "{% for m in messages %}{{ m.role }}{{ m.content }}"
PLAIN = _ALL + "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments }}"
PLAIN += "{% endfor %}{% endfor %}"
AS_JSON = PLAIN.replace("c.function.arguments", "c.function.arguments | tojson")
NO_CALLS = _ALL + "{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (NO_CALLS, PARTS, r"message 0 .* writes its content, a list of parts, as Python would"),
        (NO_CALLS, {"messages": ONE, "tools": TOOLS}, "renders nothing of 'tools', as 'add'"),
        ("{{ tools }}" + NO_CALLS, {"messages": ONE, "tools": TOOLS}, None),
        ("{% if not b is defined %}{% set b = 1 %}{% endif %}{{ a }}{{ b }}" + NO_CALLS,
         {"messages": ONE, "chat_template_kwargs": {"a": 1, "b": 2}}, None),
        (NO_CALLS, call({}), r"message 1 .* renders nothing of its call of 'add'"),
        (AS_JSON, call('{"a": "é"}'), "JSON in a string, as a string in JSON; allowed: an object"),
        (PLAIN, call({"a": 1}), "an object, as Python would; allowed: JSON in a string"),
        (AS_JSON, call({"a": 1}), None), (PLAIN, call('{"a": 1}'), None), (PLAIN, call({}), None),
    ],
)  # fmt: skip
def test_values_that_a_template_was_not_written_for(
    template: str, record: dict[str, Any], reason: str | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Jinja prints whatever it is given: a model would learn Python, or JSON in JSON."""
    ours = encoder(tokenizer, template, tmp_path)
    if reason is None:
        assert ours.encode(record)["learnt"].any()
        return
    with pytest.raises(DataError, match=reason):
        ours.encode(record)


def test_turns_that_are_rendered_otherwise_later(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What prefixes cannot tell is refused, not guessed; of one turn they can."""
    once = encoder(tokenizer, ENDS_ONCE, tmp_path)
    with pytest.raises(DataError, match=r"message 1 .* rendered otherwise .* --chat-template"):
        once.encode({"messages": turns("a", "b", "c", "d")})


def test_special_texts_can_be_let(tokenizer: Tokenizer, folder: Path) -> None:
    """With --parse-special-tokens, the text of a special token in a message is its id."""
    record = {"messages": turns("a</s>", "b")}
    assert tokenizer.eod in ChatEncoder(tokenizer, None, True).encode(record)["id"]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("{% set _ = messages.append(1) %}", "refuses it: .*append"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "refuses it: a namespace has no"),
        ("{% for i in range(10000000) %}{% endfor %}", "cannot render it: OverflowError"),
    ],
)
def test_sandbox(template: str, what: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A template reaches neither into Python nor into what it is given, nor runs for ever."""
    with pytest.raises(DataError, match=what):
        encoder(tokenizer, template, tmp_path).encode({"messages": ONE})


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "--chat needs a chat template: .* allowed: --chat-template FILE"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, "config.json; it has rag; allowed"),
        ({"chat_template": "{% for %}"}, "default is no Jinja template: "),
        ({"chat_template": 5}, "has no chat template in its tokenizer_config.json as is known"),
    ],
)
def test_no_template(config: dict[str, Any], problem: str, folder: Path, tmp_path: Path) -> None:
    """A tokenizer without a template, or with one that is none, is refused before any line."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    named = {"eos_token": "</s>", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(DataError, match=problem):
        ChatEncoder(tokenizer_for_chats(tmp_path))


def test_mutated_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whatever stands in a line: something is learnt of it, or one reason says why nothing is."""
    templates = (CHATML, MARKED_CHATML, LLAMA, MARKED_LLAMA, NEMOTRON, MARKED_NEMOTRON)
    encoders = [encoder(tokenizer, template, tmp_path) for template in templates]
    good = [*CONVERSATIONS, WITH_TOOLS, GIVEN, PARTS, call({"a": 1}), {"messages": WEIGHED}]
    learnt = 0
    for seed in range(150):
        draws = random.Random(seed)
        record: Any = draws.choice(good)
        for _ in range(draws.choice([1, 1, 2])):
            record = change_value(record, draws)[1] if record else {}
        try:
            learnt += draws.choice(encoders).encode(record)["learnt"].any()
        except DataError as error:
            assert str(error) and "\n" not in str(error)
    assert 0 < learnt < 100
