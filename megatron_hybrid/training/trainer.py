"""The training loop: read from top to bottom, it is what a run does."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from launchers.errors import POSITION
from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Steps
from megatron_hybrid.data.datasets import open_windows
from megatron_hybrid.data.loader import Replica, build_iterator
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.human import say
from megatron_hybrid.model.build import build_model_chunks
from megatron_hybrid.model.transformer_config import transformer_config
from megatron_hybrid.platform import Platform
from megatron_hybrid.training.attempts import AttemptLog
from megatron_hybrid.training.batch_sizes import check_batch_sizes
from megatron_hybrid.training.callbacks.base import Step
from megatron_hybrid.training.callbacks.ordered import build_callbacks
from megatron_hybrid.training.checkpoint import Checkpointer
from megatron_hybrid.training.distributed import is_rank_zero
from megatron_hybrid.training.optimizer import (
    LearningRate,
    build_optimizer,
    gather_parameters,
    wrap_data_parallel,
)
from megatron_hybrid.training.signals import ExitSignals
from megatron_hybrid.training.soundness import (
    Soundness,
    TrainingStoppedError,
    average_in,
    spike_threshold,
)
from megatron_hybrid.training.start import Start
from megatron_hybrid.training.step import BatchShape, Stepper, StepResult
from megatron_hybrid.training.take_up import refuse_other_plans, take_up


class Trainer:
    """One run: built from its config, brought to where its checkpoint stands, then trained.

    All ranks construct it and call `run` together, within `distributed.process_groups`.

    Args:
        config: resolved and valid.
        backend: "torch" or "transformer_engine".
        start: what the run starts from, and its data.
        started: `time.monotonic()` when the run was started, for the exit duration.

    Attributes:
        progress: steps and samples that are done.
        batches: micro batches of this rank, those of the next step first.
        reason: why the run ended; None while it goes on, and where an error ends it.
    """

    def __init__(
        self,
        config: RunConfig,
        platform: Platform,
        backend: str,
        tokenizer: Tokenizer,
        start: Start,
        started: float,
    ) -> None:
        self.config = config
        self.device = platform.device
        self.tokenizer = tokenizer
        self.started = started
        self.attempt = AttemptLog(config.run_dir)
        if is_rank_zero():
            self.attempt.start(torch.distributed.get_world_size())
        self.callbacks = build_callbacks(config, reports=is_rank_zero())
        self.data, self.carried = start.data, start.carried
        self.steps = start.data.steps
        refuse_other_plans(self.data)
        engine_config = transformer_config(config, backend, platform.device)
        chunks = build_model_chunks(config, engine_config, backend)
        self.model = wrap_data_parallel(config, engine_config, chunks)
        self.optimizer = build_optimizer(config, engine_config, self.model)
        self.stepper = Stepper(
            config, self.model, self.optimizer, backend, platform.device, self.data.source_names
        )
        self.progress = take_up(config, start, self.model, self.optimizer)
        self.stepper.objective.state = dict(self.progress.objective_state)
        consumed = self.progress.consumed_samples
        check_batch_sizes(config, self.steps, consumed, torch.distributed.get_world_size())
        schedule_start_tokens = self.steps.tokens_before(self.progress.schedule_start_samples)
        if schedule_start_tokens:  # not known to the rules before
            validate(config, schedule_start_tokens=schedule_start_tokens)
        self.learning_rate = LearningRate(config, self.optimizer, schedule_start_tokens)
        self.learning_rate.set(self.consumed_tokens())
        POSITION.iteration = self.progress.iteration
        self.total_iterations = self.progress.iteration + self.steps.steps_from(consumed)
        self.batches: Iterator[Batch] = iter(())
        self.reason: str | None = None

    def run(self) -> str:
        """Train to the end, or until a signal or a limit ends the run early.

        Returns:
            Why it ended: "finished", "SIGTERM", "exit_interval", ….

        Raises:
            TrainingStoppedError: the loss or the gradient is not sound, and the config says stop.
        """
        progress, steps = self.progress, self.steps
        train, valid = open_windows(self.config, self.tokenizer, self.data)
        self.batches = self._batches(train, steps, progress.consumed_samples, self.data.plan)
        with (
            ExitSignals() as signals,
            self.callbacks.running(self),
            Soundness(self.config, self.stepper, self.attempt, self.event, progress) as soundness,
        ):
            checkpointer = Checkpointer(
                self.config, self.model, self.optimizer, self.tokenizer,
                lambda iteration, line: self.event(iteration, "checkpoint", line),
                self.data.plan, self.carried, self.data.files,
            )  # fmt: skip
            saved_at = progress.iteration
            reason = "finished"
            if progress.consumed_samples >= steps.samples and is_rank_zero():
                say(f"nothing is left to train: all {steps.samples} samples are read")
            while progress.consumed_samples < steps.samples:
                self.callbacks.before_step(self)
                step = self._step(signals)
                self.callbacks.after_step(self, step)
                try:
                    soundness.check(progress, step.result)
                except TrainingStoppedError:
                    checkpointer.finish()  # what was saved while the run was sound
                    raise
                checkpointer.poll()
                if self.due(self.config.training.eval_interval):
                    self._evaluate(valid)
                ended = self._reason_to_end(step.result, signals)
                if ended or self.due(self.config.checkpoint.save_interval):
                    self._save(checkpointer, wait=ended is not None)
                    saved_at = progress.iteration
                if ended:
                    reason = ended
                    self.event(progress.iteration, "exit", f"{ended}: saved, ending the run")
                    break
            if saved_at < progress.iteration:
                self._save(checkpointer, wait=True)
            checkpointer.finish()
            self.reason = reason
        return reason

    def _step(self, signals: ExitSignals) -> Step:
        """One step. The learning rate and the data go on whether or not it was applied."""
        started, progress = time.perf_counter(), self.progress
        threshold = spike_threshold(self.config.training, progress)
        first_sample, learning_rate = progress.consumed_samples, self.learning_rate.current()
        shape = BatchShape(self.steps.batch_size(first_sample), self.steps.seq_length(first_sample))
        result = self.stepper.train(self.batches, shape, threshold, self._votes(signals))
        progress.iteration += 1
        POSITION.iteration = progress.iteration
        progress.consumed_samples += shape.samples
        self.learning_rate.set(self.consumed_tokens())
        if result.refusal is None:
            average_in(progress, result.loss)
            self.stepper.objective.after_step(result.reports)
            progress.objective_state = dict(self.stepper.objective.state)
        seconds = time.perf_counter() - started
        due = result.refusal is not None or self.due(self.config.training.log_interval)
        return Step(result, shape, learning_rate, seconds, due)

    def _evaluate(self, windows: Windows | None) -> None:
        """On the held-out samples, the same ones each time."""
        steps = self.data.valid_steps
        assert windows is not None and steps is not None
        shape = BatchShape(steps.batch_size(0), steps.seq_length(0))
        shapes = [shape] * (steps.samples // shape.samples)
        batches = self._batches(windows, steps, 0, self.data.valid_plan)
        found = self.stepper.evaluate(batches, shapes)
        self.callbacks.after_evaluation(self, found)

    def _save(self, checkpointer: Checkpointer, *, wait: bool) -> None:
        started = time.perf_counter()
        checkpointer.save(self.progress, wait=wait)
        self.callbacks.after_save(self, time.perf_counter() - started)

    def _batches(
        self, windows: Windows, steps: Steps, consumed_samples: int, plan: Plan | None
    ) -> Iterator[Batch]:
        replica = Replica(
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        )
        batches = build_iterator(
            windows, steps, self.config, consumed_samples=consumed_samples, replica=replica
        )
        if plan is None or not self.stepper.objective.by_source:
            return batches
        return (self.data.located(plan, batch) for batch in batches)

    def _votes(self, signals: ExitSignals) -> list[float]:
        """This rank's wishes to end the run, agreed on in the step's own reduction."""
        limit = self.config.training.exit_duration_in_mins
        late = limit is not None and time.monotonic() - self.started > limit * 60
        return [float(signals.requested() is not None), float(late)]

    def _reason_to_end(self, result: StepResult, signals: ExitSignals) -> str | None:
        """Why to save and end now, the same on every rank; None to go on."""
        signalled, late = result.votes
        if signalled:
            return signals.requested() or "signal to another rank"
        if late:
            return "exit_duration_in_mins"
        if self.due(self.config.training.exit_interval):
            return "exit_interval"
        return None

    def due(self, interval: int | None) -> bool:
        """Whether something that is done every so many iterations is done after this one."""
        return interval is not None and self.progress.iteration % interval == 0

    def consumed_tokens(self) -> int:
        """Tokens of the samples that are done."""
        return self.steps.tokens_before(self.progress.consumed_samples)

    def gather_parameters(self) -> None:
        """Have the whole model as the last step left it, on every rank; all call it together.

        With `parallel.overlap_param_gather` a rank has updated its share alone, and the others'
        come with the next forward pass.
        """
        gather_parameters(self.config, self.model)

    def event(self, iteration: int, name: str, message: str) -> None:
        """Report something that happened at a step, such as "checkpoint", in a line for people."""
        self.callbacks.on_event(self, iteration, name, message)

    def progressed(self) -> None:
        """Tell who watches over hangs that what takes long goes on."""
        self.callbacks.on_progress(self)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        """Report figures of the last step that are no scalars, as a line of `metrics.jsonl`."""
        place = {"iteration": self.progress.iteration, "consumed_tokens": self.consumed_tokens()}
        self.callbacks.on_record(self, kind, place | dict(values))
