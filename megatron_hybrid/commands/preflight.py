"""`megatron-hybrid preflight`: what would make a run fail, before it does."""

import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_hybrid.bounds import MOST_PROCESSES, MOST_SECONDS

if TYPE_CHECKING:
    from megatron_hybrid.preflight.checks import Check

WAIT_S = 20.0


def preflight(
    context: typer.Context,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROCESSES, help="start this many ranks here, and look at them too"
        ),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="ranks of the run to be, where none are started")
    ] = None,
    checksum_s: Annotated[
        float,
        typer.Option(
            min=0, max=MOST_SECONDS, help="seconds for the checksums of the data; 0: none"
        ),
    ] = 20.0,
    timeout_s: Annotated[
        float, typer.Option(min=1, max=MOST_SECONDS, help="seconds to wait for a rank")
    ] = WAIT_S,
) -> None:
    """Check a run: `preflight PRESET|FILE.yaml [section.field=value | --flag value]...`.

    Everywhere: config, tokenizer, data, checkpoint, disk. As ranks (srun, torchrun, mpirun or
    --nproc) also: versions, GPUs, clocks, a shared folder, and a collective of each kind on each
    group of the layout. Ends with 1 if anything is wrong.
    """
    from launchers.local import launch
    from megatron_hybrid.platform.warm import load_for_forks
    from megatron_hybrid.preflight.files import check_files

    launched = os.environ.get("RANK") is not None
    if world_size is not None and (nproc or launched):
        there = f"--nproc {nproc}" if nproc else f"WORLD_SIZE={os.environ['WORLD_SIZE']}"
        raise typer.BadParameter(
            f"is for where no ranks are started; {there} says how many there are",
            param_hint="--world-size",
        )
    if nproc and launched:
        raise typer.BadParameter(
            f"a launcher has started this rank already (WORLD_SIZE={os.environ['WORLD_SIZE']})",
            param_hint="--nproc",
        )
    if nproc:
        words = ["--checksum-s", str(checksum_s), "--timeout-s", str(timeout_s), *context.args]
        argv = ["-m", "megatron_hybrid.cli", "preflight", *words]
        raise typer.Exit(launch(argv, nproc, forks=load_for_forks()))
    if launched:
        world_size = int(os.environ["WORLD_SIZE"])
    reports = os.environ.get("RANK", "0") == "0"
    config, checks = check_files(context.args, world_size, checksum_s if reports else 0)
    if launched and config is not None:
        from megatron_hybrid.preflight.ranks import check_ranks

        checks += check_ranks(config, timeout_s)
    if reports:
        _report(checks)
        if timeout_s != WAIT_S and not launched:
            print(f"note: --timeout-s={timeout_s:g} has no effect: there are no ranks to wait for")
    elif config is None:  # this node sees other files than rank 0's, perhaps
        for problem in checks[0].problems:
            print(
                f"rank {os.environ['RANK']} on {socket.gethostname()}: {problem}", file=sys.stderr
            )
    if any(check.problems for check in checks):
        raise typer.Exit(1)


def _report(checks: "Sequence[Check]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "result", "what was found", box=None, padding=(0, 2, 0, 0))
    for check in checks:
        good = "[yellow]not checked[/]" if check.skipped else "[green]good[/]"
        result = f"[red]{len(check.problems)} wrong[/]" if check.problems else good
        table.add_row(check.name, result, escape(check.found))
    console = Console()
    console.print(table)
    for problem in (problem for check in checks for problem in check.problems):
        print(f"  - {problem}")
    for note in (note for check in checks for note in check.notes):
        print(f"note: {note}")
