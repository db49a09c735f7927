"""The errors that a user can cause: the command line prints their text and no traceback."""

from collections.abc import Sequence


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
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem in the config" if count == 1 else f"{count} problems in the config"
        super().__init__("\n".join([f"{head}:", *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Sent from a rank to its parent, it is made again from its problems, not from its text."""
        return ConfigError, (self.problems,)
