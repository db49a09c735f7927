"""`megatron-hybrid track`: bring a run's trackers up to date."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_hybrid.errors import UserError


def track(run: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Send to Weights & Biases or MLflow what a run's metrics have and they have not."""
    from megatron_hybrid.training.attempts import read_attempts
    from megatron_hybrid.training.trackers.follow import Copy, alone, known_targets, own_temp_folder

    targets = known_targets(run.absolute())
    if not targets:
        raise UserError(
            f"{run} has no trackers; logging.wandb_project and logging.mlflow_experiment of a run "
            "name them"
        )
    ends = [event for event in read_attempts(run) if event["event"] in ("start", "end")]
    reason = ends[-1].get("reason") if ends else None
    for target in targets:
        with alone(target, wait=False), own_temp_folder():
            copy = Copy(target)
            try:
                copy.advance(last=True)
                copy.close(reason)
            except UserError:  # of a file of ours
                raise
            except Exception as error:
                raise UserError(f"{target.kind} cannot be reached: {error}") from error
        print(f"{target.kind} has the metrics of {target.name}")
