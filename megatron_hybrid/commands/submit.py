"""`megatron-hybrid submit`: a checked run on a cluster, with its code and config kept beside it."""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from megatron_hybrid.bounds import MOST_NODES, MOST_PROCESSES


def submit(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(min=1, max=MOST_NODES, help="nodes of the job")],
    ranks_per_node: Annotated[
        int, typer.Option(min=1, max=MOST_PROCESSES, help="ranks on each node")
    ] = 8,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_PROCESSES,
            help="GPUs asked for; default: one a rank, none with backend=torch",
        ),
    ] = None,
    time_limit: Annotated[
        str, typer.Option("--time", metavar="[DAYS-]HH:MM:SS", help="Slurm's time limit")
    ] = "04:00:00",
    job_name: Annotated[
        str | None, typer.Option(help="default: the name of the run's folder")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account")] = None,
    chain: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="jobs, one after the other, each going on where one ended"
        ),
    ] = 1,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=V1,V2,...",
            help="a run for each value (with commas: in quotes); several: for each combination",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="--X=Y", help="one more option of sbatch")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="the script to fill in; default: slurm/pretrain.sbatch")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print the script, and submit nothing")] = False,
) -> None:
    """Queue a run: `submit PRESET|FILE.yaml --nodes N [section.field=value | --flag value]...`.

    Config, data and checkpoint are checked first, as far as that takes no ranks. The resolved
    config, the code and the script are kept in the run's folder, in jobs/.
    """
    from launchers.sbatch import Job, hang_note
    from megatron_hybrid.submission import not_kept, prepare, source_tree

    script = template or source_tree() / "slurm" / "pretrain.sbatch"
    job = Job(
        nodes=nodes, ranks_per_node=ranks_per_node, gpus_per_node=gpus_per_node,
        time_limit=time_limit, name=job_name, partition=partition, account=account,
        chain=chain, options=tuple(option or ()),
    )  # fmt: skip
    prepared = prepare(context.args, job, array or [], script)
    found = [
        note
        for each in prepared.configs
        if (note := hang_note(prepared.text, each.training.hang_timeout_s))
    ]
    for config in prepared.configs:
        found += not_kept(config)
    for each in dict.fromkeys([*prepared.notes, *found]):
        print(f"note: {each}", file=sys.stderr)
    if dry_run:
        print(prepared.text, end="")
        return
    for number, identity in enumerate(prepared.queue()):
        print(f"job {identity}" + (f" ({number + 1} of {chain})" if chain > 1 else ""))
    print(f"kept in {prepared.folder}: config, code and script")
    print(f"next: squeue -j {identity};  tail -F {quote(str(prepared.output(identity)))}")
