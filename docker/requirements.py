"""What an image has to install, read from setup.py without running it or the package.

    python requirements.py wanted setup.py --extra dev --without torch
    python requirements.py lacking constraints.txt

`wanted` prints the requirements of setup.py, those of extras included. `lacking` prints the lines
of a constraints file whose packages this Python does not have: what a base image brings stays as
its maker built and tested it. Both are files for pip. An extra that setup.py does not have, or a
file that cannot be read, ends with a message and code 1.
"""

import argparse
import ast
import re
import sys
from importlib import metadata
from pathlib import Path


def normal_name(requirement: str) -> str:
    """The package of a requirement, as PyPI compares names: `Foo_Bar[x]>=1` -> `foo-bar`."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", match.group()).lower() if match else ""


def literals(setup: str) -> dict[str, object]:
    """The literal values that the text of a setup.py gives to names at its top level."""
    found: dict[str, object] = {}
    for node in ast.parse(setup).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def wanted(setup: Path, extras: list[str], without: list[str]) -> list[str]:
    """The requirements of setup.py's CORE and of some of its EXTRAS, but for some packages."""
    values = literals(setup.read_text(encoding="utf-8"))
    known: dict[str, list[str]] = values["EXTRAS"]  # type: ignore[assignment]
    for extra in extras:
        if extra not in known:
            raise SystemExit(f"--extra {extra}: setup.py has no such extra; allowed: {[*known]}")
    core: list[str] = values["CORE"]  # type: ignore[assignment]
    lines = core + [line for extra in extras for line in known[extra]]
    left_out = {normal_name(name) for name in without}
    return [line for line in dict.fromkeys(lines) if normal_name(line) not in left_out]


def lacking(constraints: Path) -> list[str]:
    """The lines of a constraints file whose packages are not installed."""
    installed = {normal_name(each.metadata["Name"]) for each in metadata.distributions()}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "==" in line and normal_name(line) not in installed]


def main(words: list[str]) -> None:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    of_setup = commands.add_parser("wanted")
    of_setup.add_argument("setup", type=Path)
    of_setup.add_argument("--extra", action="append", default=[])
    of_setup.add_argument("--without", action="append", default=[])
    commands.add_parser("lacking").add_argument("constraints", type=Path)
    options = parser.parse_args(words)
    try:
        if options.command == "wanted":
            lines = wanted(options.setup, options.extra, options.without)
        else:
            lines = lacking(options.constraints)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
