"""What every section of the config stands on: strict fields, and the few types they share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Never

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Section(BaseModel):
    """A group of fields: unknown names and near-miss types ("2" for 2) are refused, not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Words:
    """Metadata of a type that its Python type does not tell: the end of "X must be ..."."""

    text: str


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


FilePath = Annotated[Path, Strict(False)]
# One or more of something: layers, ranks, samples.
Positive = Annotated[int, Field(ge=1)]
# A number of tokens or samples, where people write 15e12.
Amount = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
