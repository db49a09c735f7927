"""What the rules are made of: a rule's shape, and the sentences that several of them share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_hybrid.config.partial import UnreadableError
from megatron_hybrid.config.run import RunConfig

Problems = Iterator[str]


@dataclass(frozen=True)
class Facts:
    """What a rule may know beside the config; None: not known yet, the rule is left out.

    Attributes:
        compute_capability: of the GPUs, major and minor.
        fused_weight_gradients: whether apex's extension for them can be imported.
    """

    world_size: int | None = None
    has_cuda: bool | None = None
    schedule_start_tokens: int = 0
    compute_capability: tuple[int, int] | None = None
    fused_weight_gradients: bool | None = None


Rule = Callable[[RunConfig, Facts], Problems]
LENGTHS = ("training.train_iters", "training.train_samples", "training.train_tokens")


def on_transformer_engine(c: RunConfig, facts: Facts) -> bool:
    """Whether Transformer Engine is known to serve the layers."""
    return c.backend == "transformer_engine" or (c.backend == "auto" and facts.has_cuda is True)


def values(c: RunConfig, names: Sequence[str]) -> dict[str, object]:
    """Fields of sections by their dotted names."""
    found = {}
    for name in names:
        section, _, leaf = name.partition(".")
        found[name] = getattr(getattr(c, section), leaf)
    return found


def number_set(c: RunConfig, names: Sequence[str]) -> int:
    """How many of the fields are not null."""
    return sum(value is not None for value in values(c, names).values())


def each[T](
    field: str, items: Sequence[T] | Mapping[str, T], check: Callable[[str, T], Problems]
) -> Problems:
    """The problems of each item, by its place; one that cannot be read hides nothing of others."""
    if isinstance(items, Mapping):
        places = {f"{field}.{name}": item for name, item in items.items()}
    else:
        places = {f"{field}[{number}]": item for number, item in enumerate(items)}
    for place, item in places.items():
        try:
            yield from check(place, item)
        except UnreadableError:
            continue


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listing(values: list[int], limit: int = 12) -> str:
    """The first values, comma-separated."""
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def must_divide(name: str, value: int, of_name: str, of: int) -> Problems:
    """`value` must divide `of`; says which values do."""
    if of % value:
        yield f"{name}={value} must divide {of_name}={of}; allowed: {listing(divisors(of))}"


def must_be_multiple(name: str, value: int, of_name: str, of: int) -> Problems:
    """`value` must be a multiple of `of`; says which multiples are near."""
    if value % of:
        below = value - value % of
        near = [n for n in (below, below + of, below + 2 * of) if n > 0]
        yield f"{name}={value} must be a multiple of {of_name}={of}; allowed: {listing(near)}, ..."


def at_most_one(values: dict[str, object]) -> Problems:
    """Of several fields that say the same thing, at most one may be set."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        yield f"{shown}: they say the same thing; allowed: one of them, the others null"
