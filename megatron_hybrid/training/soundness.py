"""Whether a run may go on after a step whose loss or gradient was not sound."""

import math

from megatron_hybrid.config.sections import TrainingConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.training.checkpoint import Progress
from megatron_hybrid.training.step import StepResult

# Loss spikes are measured against an exponential mean over about this many steps.
LOSS_AVERAGE_STEPS = 50


class TrainingStoppedError(UserError):
    """The run ended because its loss or gradient was no longer sound.

    Once, that may be a GPU that computed wrongly; in the same step again and again, it is the run.
    """

    label = "unsound"


def average_in(progress: Progress, loss: float) -> None:
    """Bring a sound step's loss into the mean."""
    previous = progress.loss_average
    progress.loss_average = (
        loss if previous is None else previous + (loss - previous) / LOSS_AVERAGE_STEPS
    )


def spike_threshold(training: TrainingConfig, progress: Progress) -> float:
    """The loss above which a step is a spike."""
    factor, average = training.loss_spike_factor, progress.loss_average
    return math.inf if factor is None or average is None else factor * average


def refuse_unsound(training: TrainingConfig, progress: Progress, result: StepResult) -> None:
    """End the run where the config says so.

    Raises:
        TrainingStoppedError: the step was refused, and such steps are not to be passed over.
    """
    iteration = progress.iteration
    if result.refusal == "nonfinite" and training.nonfinite_action == "stop":
        raise TrainingStoppedError(
            f"step {iteration}: loss={result.loss} and grad_norm={result.grad_norm}, at least "
            "one not finite; nothing was updated or saved. Resume from the last checkpoint "
            "with a lower optimizer.lr, or pass over such steps with "
            "training.nonfinite_action=skip"
        )
    if result.refusal == "loss_spike" and training.loss_spike_action == "stop":
        raise TrainingStoppedError(
            f"step {iteration}: loss={result.loss:.4f} is over training.loss_spike_factor="
            f"{training.loss_spike_factor} times its mean {progress.loss_average:.4f}; "
            "nothing was updated or saved. Pass over such steps with "
            "training.loss_spike_action=skip"
        )
