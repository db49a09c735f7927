"""Seeded changes of bytes, and of values inside JSON and YAML."""

import copy
import random
from collections.abc import Iterator
from typing import Any

# What finds its way into a config by hand, by template or by a broken program.
NASTY: list[Any] = [
    None, True, "", " ", "x", "null", "4k", "1e400", -1, 0, 1, 2, 3, 7, 0.5, 1e-300, 1e300, 10**30,
    float("nan"), float("inf"), [], {}, [1], {"a": 1}, "é" * 300, "../..", "/proc/x", "a\x00b",
    [[[[]]]], "M" * 5000, "-", "|", "true", "0x10", 2**63, -(2**63) - 1,
]  # fmt: skip

Where = tuple[str | int, ...]


def places(value: Any, here: Where = ()) -> Iterator[Where]:
    """Where each value inside `value` stands, the outermost last."""
    inside = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else inside:
        yield from places(inner, (*here, key))
    if here:
        yield here


def change_value(value: Any, draws: random.Random) -> tuple[str, Any]:
    """One change somewhere inside: what it was, in words, and the new value."""
    changed = copy.deepcopy(value)
    where = draws.choice(list(places(value)))
    parent = changed
    for key in where[:-1]:
        parent = parent[key]
    key = where[-1]
    name = ".".join(map(str, where))
    kind = draws.choice(["set", "set", "set", "delete", "rename", "add", "swap"])
    if kind == "delete":
        del parent[key]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}s"] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent["surplus"] = draws.choice(NASTY)
    elif kind == "swap":
        others = [place for place in places(value) if place != where[: len(place)]]
        other = value
        for step in draws.choice(others or [where]):
            other = other[step]
        parent[key] = copy.deepcopy(other)
        return f"{name} = {str(other)[:40]!r} (of another place)", changed
    else:
        new = draws.choice(NASTY)
        parent[key] = new
        return f"{name} = {str(new)[:40]!r}", changed
    return f"{kind} {name}", changed


def change_bytes(data: bytes, draws: random.Random) -> tuple[str, bytes]:
    """One change of a file's bytes, which is never none: what it was, and the new bytes."""
    at = draws.randrange(len(data)) if data else 0
    size = min(len(data) - at, draws.choice([1, 4, 64, 4096]))
    kinds = {
        "cut": data[:at],
        "empty": b"",
        "flip": data[:at] + bytes([data[at] ^ (1 << draws.randrange(8))]) + data[at + 1 :]
        if data else b"",
        "zero": data[:at] + bytes(size) + data[at + size :],
        "drop": data[:at] + data[at + size :],
        "insert": data[:at] + draws.randbytes(draws.choice([1, 8])) + data[at:],
        "append": data + draws.randbytes(8),
        "noise": data[:at] + draws.randbytes(size) + data[at + size :],
    }  # fmt: skip
    names = [name for name, changed in kinds.items() if changed != data]
    name = draws.choice(names or ["append"])
    return f"{name} at {at} of {len(data)}", kinds[name] if names else data + b"x"
