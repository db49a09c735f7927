"""The commands of the documentation: run, or only read."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from megatron_hybrid.cli import app
from megatron_hybrid.commands.plan import UNNEEDED
from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.config.flags import parse_command_line
from tests.docs import ROOT
from tests.warm import python

PROGRAM, MODULE = "megatron-hybrid", "megatron_hybrid.cli"
# Programs of the machine: their words are looked at no further.
OTHERS = {".", "curl", "docker", "export", "pip", "source", "python3.12"}
ELLIPSES = {"...", "…"}


def commands(text: str) -> list[list[str]]:
    """The commands of a block as words, without comments, variables set before and ellipses."""
    found = []
    for line in text.replace("\\\n", " ").replace(" && ", "\n").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in ELLIPSES]
        while words and words[0].partition("=")[0].isupper():
            words.pop(0)
        if ">" in words:
            del words[words.index(">") :]
        if words and not line.startswith("S=$("):
            found.append(words)
    return found


def run(words: Sequence[str], folder: Path) -> None:
    """Run a command in a folder to its end.

    Raises:
        AssertionError: it ended with another code than 0.
    """
    if words[0] == PROGRAM:
        argv = ["-m", MODULE, *words[1:]]
    else:
        assert words[0] == "python", f"{words[0]} is not a program that a test runs"
        script = words[1] != "-m"
        argv = [str(ROOT / words[1]), *words[2:]] if script else list(words[1:])
    environment = os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    done = subprocess.run(
        [python(), *argv], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{shlex.join(words)}\nended with {done.returncode}:\n{done.stdout}"
    )


def read(words: Sequence[str]) -> None:
    """Hold a command that is not run against what it names.

    Raises:
        AssertionError: a program, file, target, option or field that there is not.
    """
    if words[:1] == ["make"]:
        targets = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        for target in words[1:]:
            assert "=" in target or any(line.startswith(f"{target}:") for line in targets), target
        return
    for at, word in enumerate(words):
        image = word.startswith(f"{PROGRAM}:") and "build" not in words
        if word in (PROGRAM, MODULE) or image:
            _read_ours(list(words[at + 1 :]))
            return
        if word.endswith((".py", ".sh", ".sbatch")):
            _read_script(word, words[at + 1 :])
            return
    assert words[0] in OTHERS, f"{words[0]} is not a program that is known: {shlex.join(words)}"


def _read_script(name: str, words: Sequence[str]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in text, f"{name} has no {word}"


def _read_ours(words: list[str]) -> None:
    """By the command's own parser; words of a config by theirs."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name=PROGRAM)
    while hasattr(command, "resolve_command"):
        _, command, words = command.resolve_command(context, words)
        context = command.context_class(command, parent=context)
    context = command.make_context(command.name, words)
    if context.allow_extra_args:
        line = parse_command_line(context.args)
        assert not line.problems, line.problems
        if line.source in presets():
            load_config(context.args, which=rules.NO_FILES, stand_in=UNNEEDED)
