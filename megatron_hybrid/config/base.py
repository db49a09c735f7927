"""What every section of the config stands on: strict fields, and the few types they share."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Section(BaseModel):
    """A group of fields: unknown names and near-miss types ("2" for 2) are refused, not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
