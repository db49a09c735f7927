"""The environment of processes: whole numbers that launchers leave there, and which code is run."""

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_hybrid.errors import UserError

MOST_PORT = 65535
_MOST = 2**31 - 1


def whole_number(
    environment: Mapping[str, str],
    name: str,
    default: int | None = None,
    *,
    least: int = 0,
    most: int = _MOST,
) -> int:
    """The number that a variable holds.

    Args:
        default: of a variable that is not set; None: it must be.

    Raises:
        UserError: naming the variable, which is no such number.
        KeyError: it is not set, and must be.
    """
    text = environment[name] if default is None else environment.get(name, str(default))
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(_MOST))
    if not digits or not least <= int(text) <= most:
        raise UserError(
            f"{name}={text[:40]!r} in the environment must be a whole number from {least} to {most}"
        )
    return int(text)


def own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables with which `python -m` runs the code that this process runs.

    By itself it takes that of the current folder first, which may be another source tree.
    """
    tree, here = Path(__file__).resolve().parents[1], Path.cwd()
    if not (here / "megatron_hybrid").is_dir() or here == tree:
        return {}
    path = os.pathsep.join(filter(None, [str(tree), environment.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
