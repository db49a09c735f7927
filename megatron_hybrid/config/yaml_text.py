"""YAML as configs need it: `8e-4` is a number, `no` is a word, a key given twice is an error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from megatron_hybrid.json_text import TOO_DEEP, is_too_deep

_DIGITS = "[0-9][0-9_]*"
_EXPONENT = "[eE][-+]?[0-9]+"
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", list("tf")),
    ("tag:yaml.org,2002:int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    # YAML 1.1 wants a dot and a signed exponent, and would read 8e-4 as text.
    ("tag:yaml.org,2002:float", rf"^[-+]?{_DIGITS}{_EXPONENT}$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        rf"^[-+]?(?:{_DIGITS}\.[0-9_]*|\.{_DIGITS})(?:{_EXPONENT})?$",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:float", r"^[-+]?\.(?:inf|nan)$", list("-+.")),
)


# Far below what runs out of the stack of C, far above what is written for a config.
_MOST_NESTING = 1000
_BLOCK_NESTING = re.compile(r"^[ ?:-]*", re.MULTILINE)


class _NoneTwice(yaml.constructor.SafeConstructor):
    """Plain values, names that are text (`3:` is "3"), and no silent overwriting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: {key.value} is given twice", None
                )
            seen.add(str(key.value))
        made = super().construct_mapping(node, deep=deep)
        return {str(key) if type(key) is int else key: value for key, value in made.items()}


class _Loader(_NoneTwice, yaml.SafeLoader):
    """SafeLoader with the few plain scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _FastLoader(_NoneTwice, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same, written in C where PyYAML has that: an eighth of the time.

    It does not bound how deep a text nests, and its messages are other words.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what `_Loader` would not read back as text."""


class _FastDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """The same, written in C where PyYAML has that: a third of the time, at every save."""


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _FastLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _FastDumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse_yaml(text: str) -> Any:
    """Read one YAML document.

    Raises:
        ValueError: it is not YAML; the text says where, in one line.
    """
    try:
        value = _loaded(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except yaml.constructor.ConstructorError as error:
        raise ValueError(error.problem) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # Of layers.* and of a pattern: to YAML, a star says that what follows is a name.
        named = error.context == "while scanning an alias" or "alias" in (error.problem or "")
        hint = "; what begins with '*' must be in quotes" if named else ""
        raise ValueError(f"{where}{error.problem}{hint}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if is_too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def _loaded(text: str) -> Any:
    """The value of a text; what is wrong with one is said by the loader written in Python."""
    leading = max(len(match[0]) for match in _BLOCK_NESTING.finditer(text))
    # A level takes a bracket, or one of the places that a line begins with; a list in a mapping
    # may begin where that does. Tabs between words are an error in one of the two only.
    nesting = text.count("[") + text.count("{") + 2 * leading
    if nesting < _MOST_NESTING and "\t" not in text:
        try:
            return yaml.load(text, Loader=_FastLoader)  # a SafeLoader: it builds plain values only
        except (yaml.YAMLError, RecursionError, ValueError):
            pass
    return yaml.load(text, Loader=_Loader)  # a SafeLoader as well


def dump_yaml(value: Any) -> str:
    """Write plain values as YAML, keys in the order given."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 100}
    try:
        return yaml.dump(value, Dumper=_FastDumper, **options)
    except UnicodeEncodeError:  # of a path whose bytes are no UTF-8
        return yaml.dump(value, Dumper=_Dumper, **options)
