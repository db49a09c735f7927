"""What a field is, in words: its dotted name, what it may hold, and the nearest known name."""

import difflib
import math
import reprlib
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_hybrid.config.base import Far, Section, Words
from megatron_hybrid.config.places import Place, write_place
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


_NOTHING = object()


def allowed(field: FieldInfo, value: object = _NOTHING) -> str:
    """What a field may hold, as the end of "X must be ...": "a whole number of at least 1".

    Args:
        value: one that it may not; bounds that are far off are told of where it is beyond them.
    """
    kind, metadata, optional = _unwrap(field)
    limits = [
        f"{words} {getattr(item, name)}"
        for marker, name, words in _BOUNDS
        for item in metadata
        if isinstance(item, marker)
    ]
    limits += [text for item in metadata if (text := _beyond(item, kind, value))]
    words = [item.text for item in metadata if isinstance(item, Words)]
    if words:
        text = words[-1]
    elif get_origin(kind) is Literal:
        text = "one of " + ", ".join(str(choice) for choice in get_args(kind))
    elif isinstance(kind, type) and issubclass(kind, Section):
        text = "a mapping of " + ", ".join(kind.model_fields)
    else:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        text = (names | {Path: "a path"})[kind]
    return " ".join([text, " and ".join(limits)]).strip() + (", or null" if optional else "")


def _beyond(bound: object, kind: Any, value: object) -> str | None:
    """What a far bound has against a value of the field's type."""
    if not isinstance(bound, Far) or value is _NOTHING or isinstance(value, bool):
        return None
    number, path = (int, float), (str, Path)
    types_of: dict[type, Any] = {int: number, float: number, str: str, Path: path}
    if isinstance(value, float) and not math.isfinite(value):
        return None  # its type has that against it
    return bound.problem(value) if isinstance(value, types_of[kind]) else None


def items_of(field: FieldInfo) -> FieldInfo | None:
    """What a field's entries (of a mapping) or items (of a list) are, if they have places."""
    kind = plain_type(field)
    if get_origin(kind) is dict:
        return FieldInfo.from_annotation(get_args(kind)[1])
    if get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
        item = FieldInfo.from_annotation(get_args(kind)[0])
        # Only a list of sections: pairs and prefixes are one value.
        return item if section_of(item) else None
    return None


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field's value is, if it is one."""
    kind = plain_type(field)
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def field_at(place: Place) -> tuple[FieldInfo | None, Place]:
    """The field, entry or item at a place of a config.

    Returns:
        It, and the place itself; None, and the longest part of the place that there is.
    """
    found: FieldInfo | None = None
    for number, part in enumerate(place):
        inner = section_of(found) if found else RunConfig
        if found is not None and plain_type(found) is Any:
            continue  # what is in it, whoever reads it knows
        if inner is not None:
            found = inner.model_fields.get(str(part))
        else:
            assert found is not None
            listed = get_origin(plain_type(found)) is tuple
            found = items_of(found) if listed == isinstance(part, int) else None
        if found is None:
            return None, place[:number]
    return found, place


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that `name` was most likely meant to be, if one is like enough (0 to 1)."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return matches[0] if matches else None


def unknown_field(place: Place) -> str:
    """The sentence for a key that is no field, with the nearest one that is."""
    if len(place) > 2 and f"{place[0]}.{place[1]}" in fields():
        return _unknown_inside(place)
    path = write_place(place[:2])
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


def _unknown_inside(place: Place) -> str:
    """The sentence for a key inside a field: a source's, a phase's."""
    _, known = field_at(place)
    info, _ = field_at(known)
    assert info is not None
    path, outer = write_place(place), write_place(known)
    if section := section_of(info):
        guess = nearest(str(place[len(known)]), section.model_fields, likeness=0.5)
        if guess:
            return f"{path} is not a field; did you mean {outer}.{guess}?"
        return f"{path} is not a field; {outer} has: {', '.join(section.model_fields)}"
    if (item := items_of(info)) and (section := section_of(item)):
        form = f"{outer}[N]" if get_origin(plain_type(info)) is tuple else f"{outer}.NAME"
        return f"{path} is not a field; write {form}.{next(iter(section.model_fields))}"
    return f"{path} is not a field; {outer} must be {allowed(info)}"


class _Typed(reprlib.Repr):
    """Values as YAML has them, within lists and mappings too."""

    def repr_bool(self, value: bool, level: int) -> str:
        return str(value).lower()

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802
        return "null"

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_PosixPath(self, value: Path, level: int) -> str:  # noqa: N802
        return str(value)


_SHORT = _Typed(
    maxlevel=6, maxtuple=50, maxlist=50, maxdict=50, maxstring=200, maxlong=200, maxother=200
)


def shown(value: object) -> str:
    """A value as it is written in YAML or typed; a very long one cut in its middle."""
    return _SHORT.repr(value)
