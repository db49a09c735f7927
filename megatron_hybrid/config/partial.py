"""A config with holes: rules read what is good, and stop where they meet what is not."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.config.base import Section


class UnreadableError(Exception):
    """A rule asked for a field that has a problem of its own, already reported."""


class Partial:
    """Reads like the section it wraps, except that a broken field raises `UnreadableError`.

    Args:
        section: the config or one section of it.
        broken: dotted names, from the config's root, of the fields with a problem of their own.
        prefix: dotted name of `section`, with a final dot; empty for the whole config.
    """

    def __init__(self, section: Section, broken: frozenset[str], prefix: str = "") -> None:
        self._section, self._broken, self._prefix = section, broken, prefix

    def __getattr__(self, name: str) -> Any:
        path = self._prefix + name
        if path in self._broken:
            raise UnreadableError(path)
        return self._wrap(getattr(self._section, name), path)

    def model_copy(self, *, update: Mapping[str, Any]) -> "Partial":
        """As a section's: the fields that get another value are good in the copy."""
        broken = self._broken - {self._prefix + name for name in update}
        return Partial(self._section.model_copy(update=update), broken, self._prefix)

    def _wrap(self, value: Any, path: str) -> Any:
        """The value at `path`, with every section in it read as this one is."""
        if isinstance(value, Section):
            return Partial(value, self._broken, f"{path}.")
        if isinstance(value, tuple):
            return tuple(self._wrap(item, f"{path}[{n}]") for n, item in enumerate(value))
        if isinstance(value, dict):
            return {name: self._wrap(item, f"{path}.{name}") for name, item in value.items()}
        return value
