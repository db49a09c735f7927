"""Whether a run may go on after a step whose loss or gradient was not sound."""

import math
from collections.abc import Callable
from types import TracebackType

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.pattern import parse_pattern
from megatron_hybrid.config.sections import TrainingConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.small_files import naming
from megatron_hybrid.training.attempts import ATTEMPTS_FILE, AttemptLog, read_attempts
from megatron_hybrid.training.checkpoint import Progress
from megatron_hybrid.training.distributed import is_rank_zero
from megatron_hybrid.training.findings import Diagnosis, unsound_steps
from megatron_hybrid.training.rerun import StepWatch
from megatron_hybrid.training.step import Stepper, StepResult

# Loss spikes are measured against an exponential mean over about this many steps.
LOSS_AVERAGE_STEPS = 50


class TrainingStoppedError(UserError):
    """The run ended because its loss or gradient was no longer sound.

    Once, that may be a GPU that computed wrongly; in the same step again and again, it is the run.

    Args:
        final: it is known to be the run's own doing.
    """

    def __init__(self, text: str, *, final: bool = False) -> None:
        super().__init__(text)
        self.label = "error" if final else "unsound"


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


def refuse_unsound(
    training: TrainingConfig, progress: Progress, result: StepResult, diagnosis: Diagnosis | None
) -> None:
    """End the run where the config says so.

    Args:
        diagnosis: whose doing a step is that was not finite, where that was looked for.

    Raises:
        TrainingStoppedError: the step was refused, and such steps are not to be passed over.
    """
    iteration = progress.iteration
    if result.refusal == "nonfinite" and training.nonfinite_action == "stop":
        found = "" if diagnosis is None else f"{diagnosis.text}\n"
        # The first line is what starts are compared by.
        raise TrainingStoppedError(
            f"step {iteration}: the loss or the gradient is not finite; nothing was updated or "
            f"saved\n{found}"
            f"loss={result.loss}, grad_norm={result.grad_norm}. Resume from the last checkpoint "
            "with a lower optimizer.lr, or pass over such steps with "
            "training.nonfinite_action=skip",
            final=diagnosis is not None and diagnosis.final,
        )
    if result.refusal == "loss_spike" and training.loss_spike_action == "stop":
        raise TrainingStoppedError(
            f"step {iteration}: loss={result.loss:.4f} is over training.loss_spike_factor="
            f"{training.loss_spike_factor} times its mean {progress.loss_average:.4f}; "
            "nothing was updated or saved. Pass over such steps with "
            "training.loss_spike_action=skip"
        )


class Soundness:
    """Looks at each step's result; where one was not finite in an earlier start, at its making too.

    All ranks use it together, as a context.

    Args:
        report: told what happened in a step: the iteration, a name, and a line.
    """

    def __init__(
        self,
        config: RunConfig,
        stepper: Stepper,
        attempt: AttemptLog,
        report: Callable[[int, str, str], None],
        progress: Progress,
    ) -> None:
        self._config, self._stepper = config, stepper
        self._attempt, self._report = attempt, report
        with naming(config.run_dir / ATTEMPTS_FILE):
            before = unsound_steps(read_attempts(config.run_dir))
        before = {step: found for step, found in before.items() if step > progress.iteration}
        if before and config.training.nonfinite_action == "stop":
            layers = parse_pattern(config.model.hybrid_layer_pattern).layers
            stepper.watch = StepWatch(stepper.model, layers, before)

    def __enter__(self) -> "Soundness":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_watch()

    def check(self, progress: Progress, result: StepResult) -> None:
        """End the run where its config says so; `attempts.jsonl` tells the next start.

        Raises:
            TrainingStoppedError: the step was refused, and such steps are not to be passed over.
        """
        iteration, watch = progress.iteration, self._stepper.watch
        findings = [] if watch is None else watch.findings
        diagnosis = watch.diagnose(iteration) if watch is not None and findings else None
        try:
            refuse_unsound(self._config.training, progress, result, diagnosis)
        except TrainingStoppedError:
            if result.refusal == "nonfinite" and is_rank_zero():
                self._attempt.unsound(iteration, findings)
            raise
        if watch is not None:
            if result.refusal is None and (text := watch.acquit(iteration)):
                self._report(iteration, "watched", f"step {iteration}: {text}")
            if iteration >= watch.last_iteration:
                self._end_watch()

    def _end_watch(self) -> None:
        if self._stepper.watch is not None:
            self._stepper.watch.close()
            self._stepper.watch = None
