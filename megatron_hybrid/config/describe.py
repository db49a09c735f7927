"""What a field is, in words: its dotted name, what it may hold, and the nearest known name."""

import difflib
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_hybrid.config.run import RunConfig


@cache
def sections() -> dict[str, type[BaseModel]]:
    """The sections of a RunConfig by name."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


@cache
def fields() -> dict[str, FieldInfo]:
    """Every field by its dotted name, in the order of the config."""
    found: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        section = sections().get(name)
        if section is None:
            found[name] = field
        else:
            found |= {f"{name}.{inner}": info for inner, info in section.model_fields.items()}
    return found


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """`int | None` → (int, True); `int` → (int, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False


def _unwrap(field: FieldInfo) -> tuple[Any, list[Any], bool]:
    """A field's plain type, its bounds and whether it may be null."""
    kind, optional = split_optional(field.annotation)
    bounds = list(field.metadata)
    while hasattr(kind, "__metadata__"):  # Annotated
        for item in kind.__metadata__:
            bounds += item.metadata if isinstance(item, FieldInfo) else [item]
        kind = kind.__origin__
    return kind, bounds, optional


def plain_type(field: FieldInfo) -> Any:
    """A field's type without bounds and without null."""
    return _unwrap(field)[0]


def is_optional(field: FieldInfo) -> bool:
    """Whether a field may be null."""
    return _unwrap(field)[2]


_BOUNDS = (
    (Ge, "ge", "of at least"),
    (Gt, "gt", "above"),
    (Le, "le", "of at most"),
    (Lt, "lt", "below"),
)


def allowed(field: FieldInfo) -> str:
    """What a field may hold, as the end of "X must be ...": "a whole number of at least 1"."""
    kind, metadata, optional = _unwrap(field)
    limits = [
        f"{words} {getattr(item, name)}"
        for marker, name, words in _BOUNDS
        for item in metadata
        if isinstance(item, marker)
    ]
    if get_origin(kind) is Literal:
        text = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    elif get_origin(kind) is tuple and get_args(kind) == (int, int):
        text = "two whole numbers such as [128, 0]"
    elif get_origin(kind) is tuple:
        text = "one prefix, or weights above 0 and prefixes such as [[0.3, a], [0.7, b]]"
    else:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        text = (names | {Path: "a path"})[kind]
    return " ".join([text, " and ".join(limits)]).strip() + (", or null" if optional else "")


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that `name` was most likely meant to be, if one is like enough (0 to 1)."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return matches[0] if matches else None


def unknown_field(path: str) -> str:
    """The sentence for a key that is no field, with the nearest one that is."""
    section, _, leaf = path.rpartition(".")
    by_leaf = {known.rpartition(".")[2]: known for known in fields()}
    siblings = list(sections()[section].model_fields) if section in sections() else []
    if leaf in by_leaf:
        guess: str | None = by_leaf[leaf]
    elif close := nearest(leaf, siblings, likeness=0.5):
        guess = f"{section}.{close}"
    else:
        close = nearest(leaf, by_leaf)
        guess = by_leaf[close] if close else None
    if guess:
        return f"{path} is not a field; did you mean {guess}?"
    if siblings:
        return f"{path} is not a field; {section} has: {', '.join(siblings)}"
    return f"{path} is not a field; sections: {', '.join(sections())}"


def shown(value: object) -> str:
    """A value as it is written in YAML or typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else repr(value)
