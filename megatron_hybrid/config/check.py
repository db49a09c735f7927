"""From plain values to a valid `RunConfig`, or to one error that names every problem."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from megatron_hybrid.config import rules
from megatron_hybrid.config.derive import DERIVED, UnderivableError
from megatron_hybrid.config.describe import (
    allowed,
    field_at,
    fields,
    nearest,
    plain_type,
    section_of,
    sections,
    shown,
    unknown_field,
)
from megatron_hybrid.config.partial import Partial, UnreadableError
from megatron_hybrid.config.pattern import pattern_problems
from megatron_hybrid.config.places import (
    Place,
    Values,
    drop_path,
    get_path,
    set_path,
    write_place,
)
from megatron_hybrid.config.rules import Facts, Rule
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.errors import ConfigError

_MISSING = object()


def keep_known(values: Mapping[str, Any]) -> tuple[Values, list[str]]:
    """A deep copy with known fields only, and a sentence for each thing that is not one."""
    kept: Values = {}
    problems = []
    for name, value in values.items():
        section = sections().get(name)
        if name in fields():
            kept[name] = copy.deepcopy(value)
        elif section is None:
            problems.append(_unknown_section(str(name), value))
        elif value is None:
            kept[name] = {}
        elif not isinstance(value, Mapping):
            problems.append(section_problem(name, value))
        else:
            known = section.model_fields
            kept[name] = {key: copy.deepcopy(value[key]) for key in value if key in known}
            problems += [unknown_field((name, str(key))) for key in value if key not in known]
    return kept, problems


def section_problem(name: str, value: Any) -> str:
    """The sentence for a section that holds something else than fields."""
    return f"{name}={shown(value)} is a section; it must hold `field: value`"


def _unknown_section(name: str, value: Any) -> str:
    guess = nearest(name, sections())
    if isinstance(value, Mapping) and guess:
        return f"{name} is not a section; did you mean {guess}?"
    return unknown_field((name,))


def _stand_in(field: FieldInfo) -> Any:
    """A value of the right type for a required field; no rule reads it."""
    kind = plain_type(field)
    if get_origin(kind) is dict:
        return {"stand-in": 1.0}
    return "M" if get_origin(kind) is tuple else {str: "M", int: 1, float: 1.0}[kind]


def _wrong_place(place: Place) -> tuple[Place, Place]:
    """What to show of a wrong value, and what to leave out of the config for it.

    Lists of plain values are shown whole. Left out is the innermost field of a section, as the
    entries of a mapping mean little without the others.
    """
    _, shown_place = field_at(place)
    field = shown_place
    while True:
        _, outer = field_at(field[:-1])
        info, _ = field_at(outer)
        if info is None or section_of(info):
            return shown_place, field
        field = outer


def _field_problem(place: Place, value: Any) -> str:
    info, _ = field_at(place)
    assert info is not None
    path = write_place(place)
    if value is _MISSING:
        return f"{path} is not set; it must be {allowed(info)}: {info.description}"
    return f"{path}={shown(value)} must be {allowed(info, value)}"


def check_types(values: Values) -> tuple[RunConfig, set[str], list[str]]:
    """Validate each field by itself; bad ones are left out of the config and named as broken.

    Bad fields are left out of `values` too.
    """
    for name in sections():
        values.setdefault(name, {})
    broken: set[str] = set()
    problems: list[str] = []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        bad = [_bad_field(item, values) for item in error.errors(include_url=False)]
        problems += [problem for _, problem in bad]
        for place in _outermost(place for place, _ in bad):
            info, _ = field_at(place)
            drop_path(values, place)
            if info is not None:
                broken.add(write_place(place))
                if info.is_required():
                    set_path(values, place, _stand_in(info))
        config = RunConfig.model_validate(values)
    if any(path.startswith("model.layers.") for path in broken):
        broken.add("model.layers")  # what a layer is depends on all entries
    pattern = "model.hybrid_layer_pattern"
    if pattern not in broken and (found := pattern_problems(config.model.hybrid_layer_pattern)):
        text = config.model.hybrid_layer_pattern
        problems += [f"{pattern}={shown(text)}: {problem}" for problem in found]
        broken.add(pattern)
    return config, broken, list(dict.fromkeys(problems))


def _bad_field(error: ErrorDetails, values: Values) -> tuple[Place, str]:
    """What is left out because of an error of pydantic's, and the error's sentence."""
    place = error["loc"]
    if place[-1] == "[key]":  # pydantic's mark for the name of an entry
        _, field = _wrong_place(place[:-2])
        what = f"{write_place(field)} has the name {place[-2]!r}"
        return field, f"{what}; a name must be of letters, digits, '_', '-' or '+'"
    if error["type"] == "extra_forbidden":
        return place, unknown_field(place)
    shown_place, field = _wrong_place(place)
    return field, _field_problem(shown_place, get_path(values, shown_place, _MISSING))


def _outermost(places: Iterable[Place]) -> list[Place]:
    """The places that lie in no other one of them."""
    found: list[Place] = []
    for place in sorted(set(places), key=len):
        if not any(place[: len(outer)] == outer for outer in found):
            found.append(place)
    return found


def _with(config: RunConfig, path: str, value: Any) -> RunConfig:
    """A copy with one field replaced by a value that is already of its type."""
    section, _, leaf = path.rpartition(".")
    inner: BaseModel = getattr(config, section)
    return config.model_copy(update={section: inner.model_copy(update={leaf: value})})


def _derive(config: RunConfig, broken: set[str]) -> tuple[RunConfig, list[str]]:
    """Fill null fields that follow from others; what cannot be worked out becomes broken."""
    problems = []
    for path, rule in DERIVED.items():
        section, _, leaf = path.rpartition(".")
        if path in broken or getattr(getattr(config, section), leaf) is not None:
            continue
        try:
            value = rule(cast(RunConfig, Partial(config, frozenset(broken))))
        except UnreadableError:
            broken.add(path)
        except UnderivableError as error:
            problems.append(str(error))
            broken.add(path)
        else:
            config = _with(config, path, value)
    return config, problems


def _apply(rule: Rule, config: RunConfig, broken: frozenset[str], facts: Facts) -> list[str]:
    """The problems one rule finds before it meets a field that cannot be read."""
    problems = []
    try:
        for problem in rule(cast(RunConfig, Partial(config, broken)), facts):
            problems.append(problem)
    except UnreadableError:
        pass  # that field's own problem is in the list
    return problems


def build_config(
    values: Mapping[str, Any],
    *,
    which: tuple[Rule, ...] = rules.ALL,
    world_size: int | None = None,
    has_cuda: bool | None = None,
    schedule_start_tokens: int = 0,
    compute_capability: tuple[int, int] | None = None,
    fused_weight_gradients: bool | None = None,
    problems: tuple[str, ...] = (),
) -> RunConfig:
    """Check plain nested values, fill derived fields and apply the rules.

    Args:
        values: sections and fields as YAML gives them.
        which: the rules to apply: `rules.ALL`, `rules.DRY_RUN` or `rules.NO_FILES`.
        world_size: ranks that will run; None: rules about it are left out.
        has_cuda: whether they have GPUs; None: rules about it are left out.
        schedule_start_tokens: consumed when the schedule of the learning rate begins.
        compute_capability: of the GPUs; None as above.
        fused_weight_gradients: whether apex's extension for them is there; None as above.
        problems: found before, to be reported with the others.

    Raises:
        ConfigError: every problem, those of single fields first.
    """
    kept, unknown = keep_known(values)
    config, broken, bad_fields = check_types(kept)
    config, underivable = _derive(config, broken)
    found = [*problems, *unknown, *bad_fields, *underivable]
    facts = Facts(
        world_size, has_cuda, schedule_start_tokens, compute_capability, fused_weight_gradients
    )
    for rule in which:
        found += _apply(rule, config, frozenset(broken), facts)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return config


def validate(
    config: RunConfig,
    world_size: int | None = None,
    has_cuda: bool | None = None,
    schedule_start_tokens: int = 0,
    compute_capability: tuple[int, int] | None = None,
    fused_weight_gradients: bool | None = None,
) -> None:
    """Apply all rules to a config, with what is known of the ranks that will run it.

    Raises:
        ConfigError: every rule that does not hold.
    """
    build_config(
        config.model_dump(mode="json"),
        world_size=world_size,
        has_cuda=has_cuda,
        schedule_start_tokens=schedule_start_tokens,
        compute_capability=compute_capability,
        fused_weight_gradients=fused_weight_gradients,
    )
