"""What a family of models is to the converter, and how its config.json is read and judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from checkpoints_converter.weights import Mapping as WeightMapping
from checkpoints_converter.weights import Names
from megatron_hybrid.config import ModelConfig


@dataclass
class Fields:
    """A config.json, with what is found wrong or worth saying while it is read.

    Attributes:
        values: as in the file; absent fields have the family's defaults.
        problems: why the model cannot be held exactly, one sentence a field.
        notes: what holds, but the user should know.
    """

    values: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; 1 stands in where it is not, which is a problem."""
        value = self.get(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.problems.append(f"{name}={value!r} must be a whole number of at least 1")
        return 1

    def number(self, name: str, default: float) -> float:
        """A finite number; `default` stands in where it is not, which is a problem."""
        value = self.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return float(value)
        self.problems.append(f"{name}={value!r} must be a number")
        return default

    def must_be(self, name: str, *allowed: Any, default: Any = None, why: str) -> Any:
        """A field that has no counterpart here; another value than those allowed is a problem."""
        value = self.get(name, default)
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            self.problems.append(f"{name}={value!r} must be {choices}: {why}")
        return value


@dataclass(frozen=True)
class Family:
    """A family of models; a module each, with one table for both directions.

    Attributes:
        model_type, architecture: as its config.json says them.
        cannot_hold: why the family cannot hold a model of ours exactly, one sentence a field.
        config: its config.json fields of a model of ours that it can hold.
        model: the fields of our `model` section of a config.json; what stands against it goes to
            `Fields.problems`.
        table: every tensor of a model, on both sides.
    """

    model_type: str
    architecture: str
    cannot_hold: Callable[[ModelConfig], list[str]]
    config: Callable[[ModelConfig], dict[str, Any]]
    model: Callable[[Fields], dict[str, Any]]
    table: Callable[[ModelConfig, Names, Names], list[WeightMapping]]
