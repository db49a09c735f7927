"""What every section of the config stands on: strict fields, and the few types they share."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Never

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    Strict,
)
from pydantic_core import CoreSchema, core_schema

from megatron_hybrid import bounds


class Section(BaseModel):
    """A group of fields: unknown names and near-miss types ("2" for 2) are refused, not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Words:
    """Metadata of a type that its Python type does not tell: the end of "X must be ..."."""

    text: str


@dataclass(frozen=True)
class Far:
    """A bound that nobody comes near but by mistake: told of only where a value is beyond it.

    Attributes:
        problem: of a value of the right type, the end of "X must be ..."; None: it is within.
    """

    problem: Callable[[Any], str | None]

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(kind))

    def _check(self, value: Any) -> Any:
        if problem := self.problem(value):
            raise ValueError(problem)
        return value


def _at_most(most: float, value: float) -> str | None:
    return f"of at most {int(most)}" if abs(value) > most else None


class FrozenDict[K, V](dict[K, V]):
    """A dict that cannot be changed after it is made, so that a frozen config is frozen whole."""

    def _refuse(self, *_: Any, **__: Any) -> Never:
        raise TypeError("a config cannot be changed; make another with model_copy")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def _whole(value: Any) -> Any:
    """Let 15e12 stand for 15000000000000; 2**53 is where a float stops counting one by one."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _at_home(value: Any) -> Any:
    """`~` as the shell has it, which leaves `run_dir=~/x` and a YAML file as they are."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111


FilePath = Annotated[Path, Strict(False), BeforeValidator(_at_home), Far(bounds.path_problem)]
# A path, or a glob, as text.
PathText = Annotated[str, BeforeValidator(_at_home), Field(min_length=1), Far(bounds.path_problem)]
Text = Annotated[str, Far(bounds.text_problem)]
_COUNTED = Far(partial(_at_most, bounds.MOST_COUNT))
Whole = Annotated[int, _COUNTED]
# None or more of something, one or more: layers, ranks, samples.
Count = Annotated[int, Field(ge=0), _COUNTED]
Positive = Annotated[int, Field(ge=1), _COUNTED]
# A number of tokens or samples, where people write 15e12.
Amount = Annotated[
    int, BeforeValidator(_whole), Field(ge=1), Far(partial(_at_most, bounds.MOST_TOKENS))
]
# The base of RoPE, which is a whole number but where it was calculated.
RotaryBase = Annotated[
    float, AfterValidator(_whole), PlainSerializer(lambda base: base), Field(ge=1),
    Far(partial(_at_most, bounds.MOST_TOKENS)),
]  # fmt: skip
# What is calculated with in float32; one above 0 must not become 0 there.
Finite = Annotated[float, Far(bounds.real_problem)]
Real = Annotated[Finite, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0), Far(partial(bounds.real_problem, positive=True))]
# Processes of one rank.
Workers = Annotated[int, Field(ge=0), Far(partial(_at_most, bounds.MOST_PROCESSES))]
# Seconds or minutes.
Duration = Annotated[float, Field(gt=0), Far(partial(_at_most, bounds.MOST_SECONDS))]
