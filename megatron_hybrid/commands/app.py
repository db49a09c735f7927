"""Groups of commands whose options have bounds (what `bounds.py` says, of every one of them), and
are all read."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from megatron_hybrid.bounds import MOST_BYTES, path_problem, real_problem, text_problem

# Options may be seeds, bytes and tokens; those of one kind say their own, smaller, most.
MOST_WHOLE = MOST_BYTES
# What the kernel takes as one word of a command line.
MOST_WORD = 128 * 1024


class App(typer.Typer):
    """As `typer.Typer`; its commands refuse NaN, what is too large or too long for anything, and
    options that nothing would read (`only_with`).
    """

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """As `typer.Typer.command`."""
        add = super().command(*args, **kwargs)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            add(_bounded(function))
            return function

        return decorate


def only_with[F: Callable[..., Any]](other: str, *names: str) -> Callable[[F], F]:
    """Options that a command reads only where another is given, and refuses where it is not.

    Args:
        other: a parameter of the function, as `names`.
    """

    def decorate(function: F) -> F:
        before = options_with(function)
        function.only_with = {**before, **dict.fromkeys(names, other)}  # type: ignore[attr-defined]
        return function

    return decorate


def options_with(function: Callable[..., Any]) -> dict[str, str]:
    """By parameter of a command, the other one that it is read with."""
    return getattr(function, "only_with", {})


def refuse_unread(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse options of a command that nothing would read.

    Args:
        given: the command's arguments by name.

    Raises:
        typer.BadParameter: names the option, and the one that it needs.
    """
    parameters = inspect.signature(function).parameters
    for name, other in options_with(function).items():
        default = parameters[name].default
        if given.get(name, default) != default and _is_missing(given.get(other)):
            raise typer.BadParameter(
                f"only with {_typed(function, other)}", param_hint=_typed(function, name)
            )


def _is_missing(value: object) -> bool:
    """Whether an option was not given; 0 is a value."""
    return value is None or value is False or value == []


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The command, called by name, as typer does, with what it reads and lies within the bounds.

    Raises:
        typer.BadParameter: names the option, its value and what is allowed.
    """

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for name, value in given.items():
            for item in value if isinstance(value, list | tuple) else [value]:
                if problem := option_problem(item):
                    raise typer.BadParameter(problem, param_hint=_typed(function, name))
            if isinstance(value, Path):  # the shell leaves --output=~/x as it is
                kwargs[name] = Path(os.path.expanduser(value))  # noqa: PTH111 (or leaves it)
        refuse_unread(function, given)
        return function(*args, **kwargs)

    return checked


def option_problem(value: object) -> str | None:
    """The sentence for a value beyond the bounds of its type."""
    problem = None
    if isinstance(value, int) and abs(value) > MOST_WHOLE:
        problem = f"from {-MOST_WHOLE} to {MOST_WHOLE}"
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    elif isinstance(value, float):
        problem = real_problem(value, positive=True)
    elif isinstance(value, Path):
        problem = path_problem(value)
    elif isinstance(value, str):
        problem = text_problem(value, MOST_WORD)
    if problem is None:
        return None
    from megatron_hybrid.config.describe import shown

    return f"{shown(value)} must be {problem}"


def _typed(function: Callable[..., Any], name: str) -> str:
    """How a parameter is typed: --max-new-tokens, CHECKPOINT."""
    annotation = inspect.signature(function).parameters[name].annotation
    infos: Iterable[Any] = get_args(annotation) if get_origin(annotation) is Annotated else ()
    for info in infos:
        if isinstance(info, OptionInfo):
            names = [word for word in info.param_decls or () if word.startswith("--")]
            return names[0] if names else f"--{name.replace('_', '-')}"
    return name.upper()
