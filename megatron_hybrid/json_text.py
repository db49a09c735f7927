"""JSON from files, and the bound on nesting that YAML has too.

Brackets alone, 100,000 of them, make Python's parsers run out of stack; a few hundred, whoever
walks over the value afterwards. What is read here is nested five deep at most.
"""

import json
from typing import Any

MOST_DEPTH = 64
TOO_DEEP = f"its brackets are nested more than {MOST_DEPTH} deep"


def parse_json(text: str | bytes) -> Any:
    """Read one JSON value.

    Raises:
        json.JSONDecodeError: it is not JSON, or is nested deeper than anybody can mean.
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError:
        raise json.JSONDecodeError(TOO_DEEP, "", 0) from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise json.JSONDecodeError(str(error), "", 0) from error
    if is_too_deep(value):
        raise json.JSONDecodeError(TOO_DEEP, "", 0)
    return value


def is_too_deep(value: Any) -> bool:
    """Whether lists and mappings are nested deeper than `MOST_DEPTH`, or within themselves."""
    found = {id(value): 1}
    left = [(value, 1)] if isinstance(value, dict | list) else []
    while left:
        outer, depth = left.pop()
        if depth > MOST_DEPTH:
            return True
        for inner in outer.values() if isinstance(outer, dict) else outer:
            # What YAML's aliases name again is looked at again only if it lies deeper there.
            if isinstance(inner, dict | list) and found.get(id(inner), 0) <= depth:
                found[id(inner)] = depth + 1
                left.append((inner, depth + 1))
    return False
