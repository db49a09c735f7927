"""How a config.json is read: a rule for every field, of its type, its range and what it must be.

A family has a table of rules. A field of a config.json that stands in no rule is a problem: what is
not known cannot be held, and a mistyped name would leave its default in force.
"""

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from megatron_hybrid.config.pattern import has_kind

MOST = 2**31 - 1  # of any size: what indexes a tensor's rows
MOST_LAYERS = 10_000
_SHOWN = 60  # characters of a value in a problem


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a field may be.

    Attributes:
        default: as a config.json would say it, where it does not.
        nullable: null is a value, and read as None.
        also: other names, which releases or published configs have for it.
        agree: names that transformers passes over and other programs read: where one is there, it
            says the same.
        layers: symbols of the layers that it matters to; "" for every model.
    """

    default: Any = None
    nullable: bool = False
    also: tuple[str, ...] = ()
    agree: tuple[str, ...] = ()
    layers: str = ""

    def read(self, value: Any) -> Any:
        """The value as the family's module takes it; None only of a nullable field.

        Raises:
            ValueError: the rest of a sentence that begins with the field and its value.
        """
        if value is None and self.nullable:
            return None
        return self.parse(value)

    def parse(self, value: Any) -> Any:
        """As `read`, of what is not null."""
        raise NotImplementedError

    def matters(self, layers: str) -> bool:
        """Whether it does to a model of these layers."""
        return not self.layers or any(has_kind(layers, kind) for kind in self.layers)


@dataclass(frozen=True, kw_only=True)
class Whole(Rule):
    """A whole number from `least` to `most`."""

    least: int = 1
    most: int = MOST

    def parse(self, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            if self.least <= value <= self.most:
                return value
            if value > self.most:
                raise ValueError(f"must be a whole number of at most {self.most}")
        raise ValueError(f"must be a whole number of at least {self.least}")


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite number of at least `least`, or above `above`, and below `below`."""

    least: float = -inf
    above: float = -inf
    below: float = inf

    def parse(self, value: Any) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            # An int may be beyond what a float holds.
            number = float(value) if abs(value) <= sys.float_info.max else inf
            within = self.least <= number < self.below and number > self.above
            if isfinite(number) and within:
                return number
        bounds = [f"of at least {self.least:g}"] if self.least > -inf else []
        bounds += [f"above {self.above:g}"] if self.above > -inf else []
        bounds += [f"below {self.below:g}"] if self.below < inf else []
        raise ValueError(f"must be a number {' and '.join(bounds)}".rstrip())


@dataclass(frozen=True, kw_only=True)
class Flag(Rule):
    """true or false."""

    def parse(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError("must be True or False")


@dataclass(frozen=True, kw_only=True)
class MustBe(Rule):
    """One of `allowed`, and `why` no other; read as what stands beside it.

    Attributes:
        allowed: value in the file -> what it is read as; the same, for a tuple of values.
    """

    allowed: Mapping[Any, Any] | tuple[Any, ...]
    why: str

    def read(self, value: Any) -> Any:
        for choice in self.allowed:
            # 1 is no True.
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return self.allowed[choice] if isinstance(self.allowed, Mapping) else choice
        choices = " or ".join(repr(choice) for choice in self.allowed)
        raise ValueError(f"must be {choices}: {self.why}")


@dataclass(frozen=True, kw_only=True)
class Parsed(Rule):
    """Whatever a function makes of it.

    Attributes:
        function: raises ValueError as `read` does.
        stand_in: what a field that is wrong is read as, where its default is none.
    """

    function: Callable[[Any], Any]
    stand_in: Any = None

    def parse(self, value: Any) -> Any:
        return self.function(value)


@dataclass(frozen=True)
class NoEffect:
    """A field that changes nothing of what the model computes, and why.

    Attributes:
        default, also, layers: as a rule's.
    """

    why: str
    default: Any = field(default=None, kw_only=True)
    also: tuple[str, ...] = field(default=(), kw_only=True)


Rules = Mapping[str, Rule | NoEffect]


def names_of(rules: Rules) -> dict[str, str]:
    """Every name that a config.json may have for a field -> the field."""
    names: dict[str, str] = {}
    for name, rule in rules.items():
        others = rule.also + (rule.agree if isinstance(rule, Rule) else ())
        names |= dict.fromkeys((name, *others), name)
    return names


class Fields:
    """A config.json, with what is found wrong or worth saying while it is read.

    Attributes:
        values: as in the file.
        problems: why the model cannot be held exactly, one sentence a field.
        notes: what holds, but the user should know.
    """

    def __init__(self, values: Mapping[str, Any], rules: Rules) -> None:
        self.values = values
        self.rules = rules
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._read: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """A field as its rule reads it. Where it is wrong, that is a problem, and the default is
        read in its place."""
        if name not in self._read:
            self._read[name] = self._look_up(name)
        return self._read[name]

    def given(self, name: str) -> bool:
        """Whether the file says it, under any of its names, and not null."""
        rule = self.rules[name]
        return any(self.values.get(each) is not None for each in (name, *rule.also))

    def refuse(self, name: str, why: str) -> None:
        """A problem of a field."""
        self.problems.append(f"{name}={_short(self.values.get(name))} {why}")

    def finish(self, layers: str, ignored: Collection[str] = ()) -> None:
        """Hold against their rules all fields that matter to a model, read so far or not.

        Args:
            layers: a symbol for each of its layers.
            ignored: names that the user says change nothing.
        """
        for name, rule in self.rules.items():
            if isinstance(rule, Rule) and rule.matters(layers):
                value = self[name]
                for other in rule.agree:
                    self._agree(name, value, other)
        known = names_of(self.rules)
        for name in ignored:
            if name in known:
                self.notes.append(f"--ignore-field {name} changes nothing: it is known here")
            elif name not in self.values:
                self.notes.append(f"--ignore-field {name} changes nothing: it is not there")
        for name, value in self.values.items():
            # What begins so is of the program that wrote the file.
            if name in known or name.startswith("_") or name in ignored:
                continue
            near = difflib.get_close_matches(name, known, 1, 0.8)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(
                f"{name}={_short(value)} is a field that is not known here{hint} "
                f"(--ignore-field {name}, if it changes nothing)"
            )

    def _look_up(self, name: str) -> Any:
        rule = self.rules[name]
        assert isinstance(rule, Rule), f"{name} is said to have no effect"
        said = {each: self.values[each] for each in (name, *rule.also) if each in self.values}
        said = {each: value for each, value in said.items() if value is not None} or said
        found: dict[str, Any] = {}
        for each, value in said.items():
            try:
                found[each] = rule.read(value)
            except (ValueError, TypeError, OverflowError) as error:
                # Of a list, an error says what is wrong in it.
                shown = "" if str(error).startswith("has ") else f"={_short(value)}"
                self.problems.append(f"{each}{shown} {error}")
        if not found:
            return self._default(name, rule, missing=not said)
        (first, value), *others = found.items()
        for other, another in others:
            if another != value:
                self.problems.append(
                    f"{first}={_short(said[first])} and {other}={_short(said[other])} differ"
                )
        return value

    def _default(self, name: str, rule: Rule, missing: bool) -> Any:
        try:
            return rule.read(rule.default)
        except (ValueError, TypeError) as error:
            if missing:
                self.problems.append(f"{name}={rule.default!r} {error}")
            if isinstance(rule, MustBe) and isinstance(rule.allowed, Mapping):
                return next(iter(rule.allowed.values()))
            return rule.stand_in if isinstance(rule, Parsed) else rule.default

    def _agree(self, name: str, value: Any, other: str) -> None:
        if self.values.get(other) is not None and self.values[other] != value:
            self.refuse(other, f"must be {value!r}, as {name}, which transformers reads")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
