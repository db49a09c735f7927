"""The errors that a user can cause: the command line prints their text and no traceback."""

import re
from collections.abc import Sequence

# A word of that length is a value that nobody meant, and says no more when it is whole.
_MOST_LINES = 100
_LONG_WORD = re.compile(r"(\S{200})\S{800,}")


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
