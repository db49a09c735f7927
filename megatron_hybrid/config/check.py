"""From plain values to a valid `RunConfig`, or to one error that names every problem."""

import copy
from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from megatron_hybrid.config import rules
from megatron_hybrid.config.derive import DERIVED, UnderivableError
from megatron_hybrid.config.describe import allowed, fields, nearest, sections, shown, unknown_field
from megatron_hybrid.config.partial import Partial, UnreadableError
from megatron_hybrid.config.pattern import pattern_problems
from megatron_hybrid.config.rules import Facts, Rule
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.errors import ConfigError

Values = dict[str, Any]
_MISSING = object()


def get_path(values: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path of nested dicts, or `default`."""
    section, _, leaf = path.rpartition(".")
    inner = values.get(section) if section else values
    return inner.get(leaf, default) if isinstance(inner, Mapping) else default


def set_path(values: Values, path: str, value: Any) -> None:
    """Set the value at a dotted path, making its section if there is none."""
    section, _, leaf = path.rpartition(".")
    inner = values.setdefault(section, {}) if section else values
    inner[leaf] = value


def drop_path(values: Values, path: str) -> None:
    """Remove the value at a dotted path, if there is one."""
    section, _, leaf = path.rpartition(".")
    inner = values.get(section) if section else values
    if isinstance(inner, dict):
        inner.pop(leaf, None)


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
            problems += [unknown_field(f"{name}.{key}") for key in value if key not in known]
    return kept, problems


def section_problem(name: str, value: Any) -> str:
    """The sentence for a section that holds something else than fields."""
    return f"{name}={shown(value)} is a section; it must hold `field: value`"


def _unknown_section(name: str, value: Any) -> str:
    guess = nearest(name, sections())
    if isinstance(value, Mapping) and guess:
        return f"{name} is not a section; did you mean {guess}?"
    return unknown_field(name)


def _stand_in(path: str) -> Any:
    """A value of the right type for a required field; no rule reads it."""
    return {str: "M", int: 1, float: 1.0}[cast(type, fields()[path].annotation)]


def _field_problem(path: str, value: Any) -> str:
    field = fields()[path]
    if value is _MISSING:
        return f"{path} is not set; it must be {allowed(field)}: {field.description}"
    return f"{path}={shown(value)} must be {allowed(field)}"


def check_types(values: Values) -> tuple[RunConfig, set[str], list[str]]:
    """Validate each field by itself; bad ones are left out of the config and named as broken."""
    for name in sections():
        values.setdefault(name, {})
    broken: dict[str, str] = {}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = ".".join(str(part) for part in item["loc"][:2])
            path = path if path in fields() else str(item["loc"][0])
            broken[path] = _field_problem(path, get_path(values, path, _MISSING))
        for path in broken:
            drop_path(values, path)
            if fields()[path].is_required():
                set_path(values, path, _stand_in(path))
        config = RunConfig.model_validate(values)
    pattern = "model.hybrid_layer_pattern"
    problems = list(broken.values())
    if pattern not in broken and (found := pattern_problems(config.model.hybrid_layer_pattern)):
        text = config.model.hybrid_layer_pattern
        problems += [f"{pattern}={text!r}: {problem}" for problem in found]
        broken[pattern] = text
    return config, set(broken), problems


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
    problems: tuple[str, ...] = (),
) -> RunConfig:
    """Check plain nested values, fill derived fields and apply the rules.

    Args:
        values: sections and fields as YAML gives them.
        which: the rules to apply: `rules.ALL`, `rules.DRY_RUN` or `rules.NO_FILES`.
        world_size: ranks that will run; None: rules about it are left out.
        has_cuda: whether they have GPUs; None: rules about it are left out.
        problems: found before, to be reported with the others.

    Raises:
        ConfigError: every problem, those of single fields first.
    """
    kept, unknown = keep_known(values)
    config, broken, bad_fields = check_types(kept)
    config, underivable = _derive(config, broken)
    found = [*problems, *unknown, *bad_fields, *underivable]
    facts = Facts(world_size, has_cuda)
    for rule in which:
        found += _apply(rule, config, frozenset(broken), facts)
    if found:
        raise ConfigError(list(dict.fromkeys(found)))
    return config


def validate(
    config: RunConfig, world_size: int | None = None, has_cuda: bool | None = None
) -> None:
    """Apply all rules to a config, with what is known of the ranks that will run it.

    Raises:
        ConfigError: every rule that does not hold.
    """
    build_config(config.model_dump(mode="json"), world_size=world_size, has_cuda=has_cuda)
