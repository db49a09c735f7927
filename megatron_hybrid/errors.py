"""The errors that a user can cause: the command line prints their text and no traceback."""

import re
from collections.abc import Sequence

_MOST_LINES = 100
# A word of that length is a value that nobody meant, and says no more when it is whole.
_LONG_WORD = re.compile(r"(\S{200})\S{800,}")
# How Python names a field that a record has not, or lacks.
_UNKNOWN_FIELD = re.compile(r"unexpected keyword argument '(\w+)'")
_MISSING_FIELD = re.compile(r"missing \d+ required (?:\w+-only |positional )?arguments?: (.+)")


class UserError(Exception):
    """Something the user can mend: a wrong config, flag, file or checkpoint.

    Attributes:
        label: how its text begins; "error" says that starting again would not mend it.
    """

    label = "error"


class ConfigError(UserError):
    """A config that breaks rules; holds every broken rule, not only the first.

    Args:
        problems: one sentence each, with the dotted field, its value, the rule and what is allowed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = [_LONG_WORD.sub(r"\1...", problem) for problem in problems]
        count = len(self.problems)
        head = "1 problem in the config" if count == 1 else f"{count} problems in the config"
        lines = [f"  - {problem}" for problem in self.problems[:_MOST_LINES]]
        if count > _MOST_LINES:
            lines.append(f"  - and {count - _MOST_LINES} more")
        super().__init__("\n".join([f"{head}:", *lines]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Sent from a rank to its parent, it is made again from its problems, not from its text."""
        return ConfigError, (self.problems,)


def in_words(error: BaseException) -> str:
    """What Python stumbled over in a file, for who can mend the file, as the end of a sentence."""
    text = str(error)
    if isinstance(error, KeyError):
        return f"{text} is missing"
    if isinstance(error, TypeError) and (found := _UNKNOWN_FIELD.search(text)):
        return f"unknown field {found.group(1)}"
    if isinstance(error, TypeError) and (found := _MISSING_FIELD.search(text)):
        return f"{found.group(1)} is missing"
    if isinstance(error, TypeError | AttributeError | LookupError):
        return f"a value is of another type or size ({text})"
    return text or type(error).__name__
