"""What a layer of each sort costs in time, measured or given: the input of stage balancing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_hybrid.config.pattern import KINDS
from megatron_hybrid.errors import UserError
from megatron_hybrid.json_text import parse_json

EMBEDDING, OUTPUT = "embedding", "output"
NAMES = (*KINDS, EMBEDDING, OUTPUT)
_KEYS = ("forward_ms", "backward_ms")
# A clock has no finer ticks, and nobody waits for more than a day; NaN is neither.
_LEAST_MS, _MOST_MS = 1e-9, 1e8


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one micro batch, forward and backward."""

    forward_ms: float
    backward_ms: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.forward_ms + other.forward_ms, self.backward_ms + other.backward_ms)

    @property
    def total_ms(self) -> float:
        """Both passes."""
        return self.forward_ms + self.backward_ms


NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Costs:
    """Attributes: `of`: a sort's name (a symbol of the pattern; "M5" of layers, the first of them
    number 5, that are unlike the first of their kind), "embedding" or "output" (with the loss):
    cost."""

    of: MappingProxyType[str, Cost]

    def chunks(self, segments: tuple[Sequence[str], ...]) -> list[Cost]:
        """The cost of each pipeline segment, with embedding and output at the ends."""
        found = [sum((self.of[kind] for kind in segment), NOTHING) for segment in segments]
        found[0] = found[0] + self.of.get(EMBEDDING, NOTHING)
        found[-1] = found[-1] + self.of.get(OUTPUT, NOTHING)
        return found


def read_costs(path: Path, sorts: Iterable[str]) -> Costs:
    """Costs from JSON: {"M": {"forward_ms": 1.2, "backward_ms": 2.3}, ..., "output": {...}}.

    Args:
        sorts: names that must be there.

    Raises:
        UserError: the file cannot be read, or says something else.
    """
    try:
        given = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--costs={path} cannot be read as JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise UserError(
            f'--costs={path} must hold an object, such as {{"M": {{"forward_ms": 1.2}}}}'
        )
    allowed = [*NAMES, *sorted(set(sorts) - set(NAMES))]
    problems = [
        f"{name!r} is no layer; allowed: {', '.join(allowed)}"
        for name in given
        if name not in allowed
    ]
    problems += [f"{name!r} is missing" for name in sorted(set(sorts) - set(given))]
    found = {}
    for name, cost in given.items():
        pair = [cost.get(key) for key in _KEYS] if isinstance(cost, Mapping) else []
        numbers = [float(n) for n in pair if n is not None and _is_cost(n)]
        if len(numbers) == len(_KEYS):
            found[name] = Cost(*numbers)
        else:
            problems.append(
                f"{name!r} must have forward_ms and backward_ms, numbers from 0 to {_MOST_MS:g}"
            )
    if not problems and not any(cost.total_ms for cost in found.values()):
        problems.append("all milliseconds are 0; one must be above 0")
    if problems:
        raise UserError(f"--costs={path}: " + "; ".join(problems))
    return Costs(MappingProxyType(found))


def _is_cost(number: object) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return number == 0 or _LEAST_MS <= number <= _MOST_MS


def costs_json(costs: Costs) -> str:
    """What `read_costs` reads."""
    return json.dumps({name: vars(cost) for name, cost in costs.of.items()}, indent=2)
