"""`megatron-hybrid smoke-test`: does training work here, on one rank and in every layout?"""

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from megatron_hybrid.bounds import MOST_PROCESSES


def smoke_test(
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROCESSES, help="ranks; by default one a GPU, or 2 on the CPU"
        ),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="such as TP2,PP2; by default all that fit the ranks"),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="folder in which the runs stay; it must be empty")
    ] = None,
) -> None:
    """Train a small model for some steps in several layouts, which must agree with one rank.

    Layouts: TP2, PP2, CP2, EP2, DP, TP2xPP2. All start from a checkpoint that one rank has saved,
    and one rank goes on from what the first of them saves. The exit code is 1 if losses differ or
    a training fails. A launcher's ranks (RANK, WORLD_SIZE, ...) run it together; they need some
    ports above MASTER_PORT.
    """
    from megatron_hybrid.smoke.check import smoke_test as test

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    # As a container's first process this one has no default handler, and what it started must end.
    signal.signal(signal.SIGTERM, end)
    names = None if layouts is None else [name.strip() for name in layouts.split(",")]
    if not test(nproc, names, keep):
        raise typer.Exit(1)
