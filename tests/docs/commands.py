"""The commands of the documentation: run, each in a fork of one warm process, or only read."""

import importlib
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import typer

from launchers.place import free_port
from megatron_hybrid.cli import app
from megatron_hybrid.commands.plan import UNNEEDED
from megatron_hybrid.config import load_config, presets, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.testing import distributed
from tests.docs import ROOT

PROGRAM, MODULE = "megatron-hybrid", "megatron_hybrid.cli"
# Programs of the machine: their words are looked at no further.
OTHERS = {".", "docker", "export", "pip", "source", "python3.12"}
ELLIPSES = {"...", "…"}
# Imported once, for all commands.
WARM = (
    "megatron_hybrid.cli", "megatron_hybrid.training.pretrain", "megatron_hybrid.generation",
    "megatron_hybrid.data.tokenizing.console", "checkpoints_converter.export", "matplotlib.pyplot",
)  # fmt: skip


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


class Walker:
    """One process that has imported everything, and forks for each command.

    Args:
        folder: where commands are run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output.txt"
        context = distributed.warm_context()
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, str(folder), dict(os.environ)))
        self._process.start()
        there.close()

    def run(self, words: Sequence[str]) -> str:
        """Run a command to its end, as many ranks as its `--nproc` says; what it printed.

        Raises:
            AssertionError: it ended with another code than 0.
        """
        argv, ranks = list(words), 1
        if "--nproc" in argv and "--dry-run" not in argv:
            at = argv.index("--nproc")
            ranks = int(argv[at + 1])
            del argv[at : at + 2]
        self.output.write_bytes(b"")
        self._pipe.send((argv, ranks, free_port()))
        codes = self._pipe.recv()
        printed = self.output.read_text(encoding="utf-8")
        assert codes == [0] * ranks, f"{shlex.join(words)}\nended with {codes}:\n{printed}"
        return printed

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, folder: str, environment: dict[str, str]) -> None:
    """Run the commands that come through the pipe; send back their exit codes."""
    os.environ.clear()
    os.environ.update(environment | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "160"})
    os.chdir(folder)
    for name in WARM:
        importlib.import_module(name)
    while True:
        try:
            argv, ranks, port = pipe.recv()
        except EOFError:
            return
        children = [_fork(argv, rank, ranks, port) for rank in range(ranks)]
        pipe.send([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


def _fork(argv: list[str], rank: int, ranks: int, port: int) -> int:
    """A process that runs a command, as torchrun would start it where there are several ranks."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open("output.txt", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update(MASTER_ADDR="localhost", LOCAL_WORLD_SIZE=str(ranks))
        code = _call(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(argv: list[str]) -> int:
    """What a shell would start, in this process; its exit code."""
    import torch

    torch.set_num_threads(1)
    sys.argv = argv
    try:
        if argv[0] == PROGRAM:
            from megatron_hybrid.cli import main

            main()
        elif argv[:2] == ["python", "-m"]:
            sys.argv = argv[2:]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        else:
            assert argv[0] == "python", f"{argv[0]} is not a program that a test runs"
            sys.argv = argv[1:]
            runpy.run_path(str(ROOT / argv[1]), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


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
