"""`megatron-hybrid verdict`: what a batch script does next when the ranks of a run have ended."""

import os
import time
from typing import Annotated

import typer

AGAIN_CODE = 75  # as sysexits.h has it: a temporary failure, try again


def verdict(
    context: typer.Context,
    exit_code: Annotated[int, typer.Option(min=0, help="with which the ranks ended")],
    world_size: Annotated[int, typer.Option(min=1, help="how many there were")],
) -> None:
    """Say how the ranks ended: `verdict CONFIG [section.field=value]... --exit-code N`.

    The words are those of `pretrain`. Ends with 0 if the run is done or was asked to end here, with
    75 if it should start again, and with 1 if that would not help.
    """
    from launchers.errors import first_error
    from launchers.place import LOGS
    from launchers.slurm import start_name
    from megatron_hybrid.config import load_config
    from megatron_hybrid.fileio import file_errors
    from megatron_hybrid.training.attempts import ATTEMPTS_FILE, append, read_attempts
    from megatron_hybrid.training.verdict import AGAIN, DONE, STOP, failure, judge

    # Checked as by the ranks: what they refused before they had a folder is refused here.
    config = load_config(context.args, world_size=world_size)
    start = start_name(os.environ)
    folders = sorted(
        (config.run_dir / LOGS).glob(f"{start}.*" if start else "*"),
        key=lambda folder: folder.stat().st_mtime,
    )
    error = first_error(folders[-1]) if folders else None
    attempts = config.run_dir / ATTEMPTS_FILE
    with file_errors(config.run_dir):
        if exit_code:
            name = folders[-1].name if folders else "unknown"
            event = {"event": "failure", "time": time.time()} | failure(name, exit_code, error)
            append(attempts, event)
        found = judge(read_attempts(config.run_dir))
        if found.action == STOP:
            append(attempts, {"event": "stop", "time": time.time(), "text": found.text})
    if error is not None and exit_code:
        print(error.text)
    print(f"{found.action}: {found.text}", flush=True)
    if found.action == AGAIN:
        raise typer.Exit(AGAIN_CODE)
    if found.action != DONE:
        raise typer.Exit(1)
