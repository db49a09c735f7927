"""The command line of a config: `section.field=value` and Megatron-LM's flags for the same fields.

The flags are made from the fields: `--field-name value`, and `--field-name` / `--no-field-name`
where a field is true or false. The tables below hold what Megatron-LM calls otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_hybrid.config import megatron_fp8
from megatron_hybrid.config.describe import (
    allowed,
    field_at,
    fields,
    is_optional,
    nearest,
    plain_type,
    unknown_field,
)
from megatron_hybrid.config.megatron_flags import meaning
from megatron_hybrid.config.places import PLACE, read_place
from megatron_hybrid.config.yaml_text import parse_yaml

_OTHER_NAMES = {
    "--hybrid-override-pattern": "model.hybrid_layer_pattern",
    "--fp8-recipe": megatron_fp8.RECIPE,
    "--norm-epsilon": "model.layernorm_epsilon",
    "--num-experts": "model.num_moe_experts",
}
_SWITCHES: dict[str, tuple[str, Any]] = {
    "--squared-relu": ("model.activation", "squared_relu"),
    "--swiglu": ("model.activation", "swiglu"),
    "--disable-bias-linear": ("model.add_bias_linear", False),
    "--bf16": ("precision.recipe", "bf16"),
    "--reset-attention-mask": ("data.packed_documents", True),
    "--sft": ("training.objective", "sft"),
}
_MEGATRON_VALUES: dict[str, Mapping[str, str]] = {
    megatron_fp8.RECIPE: megatron_fp8.RECIPES,
    "data.tokenizer_type": {
        "SentencePieceTokenizer": "sentencepiece",
        "GPTSentencePieceTokenizer": "sentencepiece",
        "HuggingFaceTokenizer": "huggingface",
        "NullTokenizer": "null",
    },
}
_OVERRIDE = re.compile(rf"({PLACE})=(.*)", re.DOTALL)
_FLAG = re.compile(r"(--[a-z][\w-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Flag:
    """A flag: the field it sets, and the value it stands for (`takes_value`: the one after it)."""

    name: str
    path: str
    takes_value: bool
    value: Any = None


@cache
def flags() -> dict[str, Flag]:
    """Every flag by its name."""
    found = []
    for path, info in fields().items():
        name = path.rpartition(".")[2].replace("_", "-")
        if plain_type(info) is bool:
            found.append(Flag(f"--{name}", path, False, True))
            found.append(Flag(f"--no-{name}", path, False, False))
        else:
            found.append(Flag(f"--{name}", path, True))
    found += [Flag(name, path, True) for name, path in _OTHER_NAMES.items()]
    found += [Flag(name, path, False, value) for name, (path, value) in _SWITCHES.items()]
    table = {flag.name: flag for flag in found}
    assert len(table) == len(found), "two fields make the same flag"
    return table


@dataclass
class CommandLine:
    """What was typed: the first word, the values in order, and what could not be understood.

    `fp8_flags` are Megatron-LM's that are no fields, with their words.
    """

    source: str | None = None
    values: list[tuple[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fp8_flags: dict[str, str] = field(default_factory=dict)


def read_value(path: str, text: str) -> Any:
    """A field's value from its text; what cannot be read stays text, which its type refuses."""
    info, _ = field_at(read_place(path))
    assert info is not None
    kind = plain_type(info)
    if is_optional(info) and text == "null":
        return None
    if kind in (str, Path) or get_origin(kind) is Literal:
        return _MEGATRON_VALUES.get(path, {}).get(text, text)
    if get_origin(kind) is tuple and _holds_text(kind) and not text.startswith("["):
        return text
    if get_origin(kind) is tuple and Ellipsis not in get_args(kind):
        text = f"[{text.strip('()[]')}]"
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def _holds_text(kind: Any) -> bool:
    """Whether the items of a list are text, so that a single one needs no quotes."""
    return plain_type(FieldInfo.from_annotation(get_args(kind)[0])) is str


def _read_blend(words: Sequence[str]) -> Any:
    """`--data-path`'s words: numbers are weights, the rest prefixes."""
    if len(words) == 1 and words[0].startswith("["):
        return read_value("data.data_path", words[0])
    parsed = [read_value("model.hidden_dropout", word) for word in words]
    return [
        value if isinstance(value, int | float) and index % 2 == 0 and len(words) > 1 else word
        for index, (value, word) in enumerate(zip(parsed, words, strict=True))
    ]


def _is_list_of_words(path: str) -> bool:
    """Whether a field is a list of names or numbers, which Megatron-LM's flags take as words."""
    kind = plain_type(fields()[path])
    if get_origin(kind) is not tuple or Ellipsis not in get_args(kind):
        return False
    item = plain_type(FieldInfo.from_annotation(get_args(kind)[0]))
    return item is int or get_origin(item) is Literal


def _read_given(path: str, words: Sequence[str]) -> Any:
    """A field's value from the words after its flag."""
    if path == "data.data_path":
        return _read_blend(words)
    if _is_list_of_words(path) and not words[0].startswith("["):
        return [read_value(path, word) for word in words]
    return read_value(path, words[0])


def _starts_something(word: str) -> bool:
    """Whether a word is a flag or an override, and so no value of the flag before it."""
    override = _OVERRIDE.fullmatch(word)
    return bool(_FLAG.fullmatch(word)) or (override is not None and _is_field(override[1]))


def _is_field(path: str) -> bool:
    """Whether a path names a field, or an entry or item inside one, and no whole section."""
    info, _ = field_at(read_place(path))
    return info is not None and (path in fields() or "." in path)


def _take_flag(words: list[str], line: CommandLine) -> None:
    """Read the flag that `words` starts with, and its values, off the front of `words`."""
    word = words.pop(0)
    match = _FLAG.fullmatch(word)
    assert match
    name, inline = match[1].replace("_", "-"), match[2]
    flag = flags().get(name)
    if name in megatron_fp8.FLAGS:
        _take_fp8_flag(name, inline, words, line)
    elif flag is None:
        line.problems.append(_unknown_flag(name))
        while words and not _starts_something(words[0]):
            words.pop(0)
    elif not flag.takes_value:
        if inline is not None:
            line.problems.append(f"{name} takes no value, but {inline!r} was given")
        # With Megatron-LM, --bf16 beside an FP8 recipe takes nothing back.
        if name != "--bf16" or not megatron_fp8.fp8_recipe_of(line.values):
            line.values.append((flag.path, flag.value))
    else:
        given = [inline] if inline is not None else []
        several = flag.path == "data.data_path" or _is_list_of_words(flag.path)
        while words and not _starts_something(words[0]) and (several or not given):
            given.append(words.pop(0))
        if not given:
            line.problems.append(f"{name} needs a value: {allowed(fields()[flag.path])}")
        else:
            line.values.append((flag.path, _read_given(flag.path, given)))


def _unknown_flag(name: str) -> str:
    """The sentence for what is no flag: its meaning if it is Megatron-LM's, else the nearest."""
    if said := meaning(name):
        return f"{name} of Megatron-LM is not taken; {said}"
    guess = nearest(name, flags())
    hint = f"did you mean {guess}?" if guess else "`pretrain --help` lists the flags"
    return f"{name} is not a flag; {hint}"


def _take_fp8_flag(name: str, inline: str | None, words: list[str], line: CommandLine) -> None:
    """Read one of Megatron-LM's FP8 flags; what it means depends on the others."""
    takes_value = name in megatron_fp8.WITH_VALUE
    if not takes_value and inline is not None:
        line.problems.append(f"{name} takes no value, but {inline!r} was given")
    elif takes_value and inline is None:
        if not words or _starts_something(words[0]):
            line.problems.append(f"{name} needs a value")
            return
        inline = words.pop(0)
    line.fp8_flags[name] = inline or ""


def parse_command_line(args: Sequence[str]) -> CommandLine:
    """Read `[preset or YAML file] [section.field=value | --flag [value]] ...`, in any order.

    Where a field is given twice the later value stands, as with Megatron-LM's own flags.
    """
    line, words = CommandLine(), list(args)
    if words and not _FLAG.fullmatch(words[0]) and not _OVERRIDE.fullmatch(words[0]):
        line.source = words.pop(0)
    while words:
        if _FLAG.fullmatch(words[0]):
            _take_flag(words, line)
            continue
        word = words.pop(0)
        match = _OVERRIDE.fullmatch(word)
        if match is None:
            line.problems.append(
                f"{word!r} is neither section.field=value nor a flag; a preset or a YAML file "
                "comes first"
            )
        elif not _is_field(match[1]):
            line.problems.append(unknown_field(read_place(match[1])))
        else:
            path, text = match[1], match[2]
            blend = path == "data.data_path"
            line.values.append((path, _read_blend_text(text) if blend else read_value(path, text)))
    line.values, problems = megatron_fp8.apply_fp8_flags(line.fp8_flags, line.values)
    line.problems += problems
    return line


def _read_blend_text(text: str) -> Any:
    """The override's form of `--data-path`: words if the first is a weight, else one prefix."""
    words = text.split()
    if text == "null" or not words:
        return None
    weight = read_value("model.hidden_dropout", words[0])
    weighted = len(words) > 1 and isinstance(weight, int | float)
    return _read_blend(words if weighted else [text])
