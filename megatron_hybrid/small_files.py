"""Small files, read by one mechanism: whatever is wrong with one is said with its name.

Half a file, another type, an unknown field: the reader of its content may stumble as it likes.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import ConfigError, UserError, in_words
from megatron_hybrid.json_text import parse_json

_STUMBLES = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, UserError,
)  # fmt: skip


@contextmanager
def naming(path: Path, error: type[UserError] = UserError) -> Iterator[None]:
    """What goes wrong while a file is read, or made sense of, is said with its name.

    Raises:
        UserError: or another class, `error`.
    """
    try:
        yield
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    except _STUMBLES as cause:
        if isinstance(cause, error) and str(cause).startswith(str(path)):
            raise
        if isinstance(cause, ConfigError):  # whole, but of another version or edited
            raise error(f"{path} cannot be used: {cause}") from cause
        raise error(f"{path} is damaged: {in_words(cause)}") from cause


def read_json(
    path: Path, error: type[UserError] = UserError, fields: Collection[str] | None = None
) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        error: class of the errors.
        fields: all that it may have; None: any.

    Raises:
        UserError: naming the file: it cannot be read, is no JSON object, or has other fields.
    """
    with naming(path, error):
        data = path.read_bytes()
        try:
            content = parse_json(data)
        except ValueError as cause:
            raise ValueError(f"not JSON ({cause})") from cause
        if not isinstance(content, Mapping):
            raise ValueError(f"it must hold a JSON object, and holds {content!s:.40}")
        unknown = sorted(set(content) - set(fields)) if fields is not None else []
        if unknown:
            raise ValueError(
                f"unknown field {', '.join(unknown)}; allowed: {', '.join(sorted(fields or ()))}"
            )
        return dict(content)
