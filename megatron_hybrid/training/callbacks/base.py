"""What a callback is: hooks that the loop calls, none of which need be there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_hybrid.training.step import BatchShape, StepResult
    from megatron_hybrid.training.step_metrics import StepMetrics
    from megatron_hybrid.training.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """A step that was done.

    Attributes:
        result: what it found, the same on every rank.
        shape: of its global batch.
        learning_rate: that the optimizer used.
        seconds: that it took on this rank.
        due: whether it is one of those that are reported: every `training.log_interval`-th, and
            each one whose update was refused.
    """

    result: "StepResult"
    shape: "BatchShape"
    learning_rate: float
    seconds: float
    due: bool


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: on the held-out samples.
        is_cross_entropy: of tokens, in nats: its exponential is the perplexity.
        extra: what else was found there.
    """

    loss: float
    is_cross_entropy: bool
    extra: Mapping[str, float] = field(default_factory=dict)


class Callback:
    """Looks on, records, or ends a run by an error; a subclass has the hooks that it needs.

    Every rank makes its own, without arguments, and calls each hook at the same moment: a hook may
    use collectives, if it does so on all ranks. What a hook draws of torch's random numbers is not
    taken from the run's. A callback has no state in checkpoints: what it must know after a restart
    it takes from `run.progress`, or from a file of its own in `run.config.run_dir`.

    `run` is the `Trainer`: its `config`, `progress` (steps and samples that are done), `model`
    (this rank's pipeline chunks), `optimizer`, `stepper`, `total_iterations`; `run.event` and
    `run.record` report something to all who write. Whoever reads parameters after a step calls
    `run.gather_parameters` first: with `parallel.overlap_param_gather` some are of the step before.
    """

    def on_run_start(self, run: "Trainer") -> None:
        """Before the first step of this start; the checkpoint is loaded."""

    def before_step(self, run: "Trainer") -> None:
        """Before step `run.progress.iteration + 1`."""

    def after_step(self, run: "Trainer", step: Step) -> None:
        """After step `run.progress.iteration`, whether or not its update was applied."""

    def on_bad_step(self, run: "Trainer", step: Step) -> None:
        """After `after_step`, where the update was refused (`step.result.refusal` says why).

        The run then goes on or ends, as `training.nonfinite_action` and `loss_spike_action` say.
        """

    def after_evaluation(self, run: "Trainer", evaluation: Evaluation) -> None:
        """After an evaluation."""

    def on_progress(self, run: "Trainer") -> None:
        """Something that takes long, and is no step, goes on: for who watches over hangs."""

    def after_save(self, run: "Trainer", seconds: float) -> None:
        """After a checkpoint is written, or handed over to be written in the background.

        Args:
            seconds: for which training stood still.
        """

    def on_run_end(self, run: "Trainer", reason: str | None) -> None:
        """At the end, for each one whose `on_run_start` has returned; the last one first.

        Args:
            reason: "finished", "SIGTERM", ...; None: an error ends the run.
        """

    def metrics(self, run: "Trainer", step: Step) -> Mapping[str, float]:
        """Figures of a step that is reported (`step.due`), for `extra` of its record.

        All ranks are asked; rank 0's are recorded.
        """
        return {}

    def on_metrics(self, run: "Trainer", metrics: "StepMetrics") -> None:
        """A step is reported: for those who write it somewhere."""

    def on_record(self, run: "Trainer", kind: str, record: Mapping[str, Any]) -> None:
        """Another record is reported (`run.record`): a kind of line of `metrics.jsonl`."""

    def on_event(self, run: "Trainer", iteration: int, name: str, message: str) -> None:
        """Something has happened that people should read (`run.event`)."""
