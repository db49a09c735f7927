"""A step's own process: what it finds goes to the check, part by part.

A part that raises has failed, and the others go on. What a toy cannot do without a GPU raises
`NeedsGpuError`, or the stand-in's NotImplementedError; on a GPU both are failures.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
MOST_LETTERS = 800
# How a step's process begins; its arguments: module:function PIPE WORK SUMMARY [--toy].
PROGRAM = "from tests.gpu.findings import main; main()"


class NeedsGpuError(Exception):
    """What a toy cannot do, and why."""


class Findings:
    """What a step has found.

    Attributes:
        work: a folder for what it needs on the way.
        toy: at toy size, with stand-ins.
        summary: the file of all steps before this one.
    """

    def __init__(self, pipe: int, work: Path, summary: Path, *, toy: bool) -> None:
        self._pipe = pipe
        self.work, self.summary, self.toy = work, summary, toy

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """A part of the step, whose figures the block puts into the dictionary."""
        found: dict[str, Any] = {"name": name, "status": OK}
        try:
            yield found
        except (NeedsGpuError, NotImplementedError) as error:
            found |= {"status": SKIPPED if self.toy else FAILED, "why": _said(error)}
        except Exception as error:
            traceback.print_exc()
            found |= {"status": FAILED, "why": _said(error)}
        self._tell(found)

    def skip(self, name: str, why: str) -> None:
        """A part that is nothing for the GPU that is here."""
        self._tell({"name": name, "status": SKIPPED, "why": why})

    def _tell(self, found: dict[str, Any]) -> None:
        os.write(self._pipe, json.dumps(found).encode() + b"\n")


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > MOST_LETTERS:  # a program's output says at its end what went wrong
        text = f"{text[: MOST_LETTERS // 4]} ... {text[-MOST_LETTERS * 3 // 4 :]}"
    return text if isinstance(error, NeedsGpuError) else f"{type(error).__name__}: {text}"


def status_of(parts: list[dict[str, Any]]) -> str:
    """Of a step that came to its end: failed if a part has; skipped if all are."""
    found = {part["status"] for part in parts}
    if FAILED in found or not found:
        return FAILED
    return OK if OK in found else SKIPPED


def main() -> None:
    """Run the step that the command line names."""
    work, pipe, folder, summary, *toy = sys.argv[1:]
    os.set_inheritable(int(pipe), False)
    findings = Findings(int(pipe), Path(folder), Path(summary), toy=bool(toy))
    module, _, name = work.partition(":")
    if toy:
        from tests.gpu_on_cpu import stand_in

        stand_in.install()
    getattr(importlib.import_module(module), name)(findings)
