"""Places in plain values: "data.phases[1].weights.web" is ("data", "phases", 1, "weights", "web").

A section's fields and a mapping's entries are reached by name, the items of a list by number.
"""

import re
from collections.abc import Mapping
from typing import Any

Values = dict[str, Any]
Place = tuple[str | int, ...]
PLACE = r"[A-Za-z_]\w*(?:\.[\w+*-]+|\[-?\d+\])*"
_PART = re.compile(r"\[(-?\d+)\]|([\w+*-]+)")


def read_place(text: str) -> Place:
    """The parts of a place as it is written."""
    return tuple(name or int(number) for number, name in _PART.findall(text))


def write_place(place: Place) -> str:
    """A place as it is written."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _place(path: str | Place) -> Place:
    return read_place(path) if isinstance(path, str) else path


def _has(container: Any, part: str | int) -> bool:
    """Whether a mapping has an entry, or a list an item."""
    if isinstance(container, list | tuple):
        return isinstance(part, int) and 0 <= part < len(container)
    return isinstance(container, Mapping) and part in container


def get_path(values: Mapping[str, Any], path: str | Place, default: Any = None) -> Any:
    """The value at a place, or `default`."""
    inner: Any = values
    for part in _place(path):
        if not _has(inner, part):
            return default
        inner = inner[part]
    return inner


def set_path(values: Values, path: str | Place, value: Any) -> str | None:
    """Set the value at a place, making the mappings on the way, but no items of a list.

    Returns:
        A sentence where the place is an item that its list does not have. A place inside a value
        that is neither a mapping nor a list is left alone: that value's own type is wrong.
    """
    place = _place(path)
    inner: Any = values
    for number, part in enumerate(place):
        if isinstance(inner, list) and isinstance(part, int) and not _has(inner, part):
            return _no_item(place, place[:number], len(inner))
        if not isinstance(inner, dict) and not _has(inner, part):
            return None
        if number == len(place) - 1:
            inner[part] = value
        elif isinstance(inner, dict) and inner.get(part) is None:
            inner[part] = [] if isinstance(place[number + 1], int) else {}
        inner = inner[part]
    return None


def _no_item(place: Place, outer: Place, length: int) -> str:
    name = write_place(outer)
    items = f"{name}[0] to {name}[{length - 1}]" if length > 1 else f"{name}[0]"
    allowed = f"allowed: {items}" if length else f"set {name} whole"
    return f"{write_place(place)}: {name} has {length} items; {allowed}"


def drop_path(values: Values, path: str | Place) -> None:
    """Remove the value at a place of a mapping, if there is one."""
    *outer, last = _place(path)
    inner = get_path(values, tuple(outer))
    if isinstance(inner, dict):
        inner.pop(last, None)
