"""The training loop: read from top to bottom, it is what a run does."""

import hashlib
import time
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from launchers.errors import POSITION
from launchers.place import log_folder
from megatron_hybrid.checkpoint.progress import Progress
from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.batches import Steps
from megatron_hybrid.data.datasets import open_windows
from megatron_hybrid.data.loader import Replica, build_iterator
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.errors import UserError
from megatron_hybrid.model.build import build_model_chunks
from megatron_hybrid.model.counts import flops_per_token
from megatron_hybrid.model.transformer_config import transformer_config
from megatron_hybrid.platform import Platform
from megatron_hybrid.training.attempts import AttemptLog
from megatron_hybrid.training.batch_sizes import check_batch_sizes
from megatron_hybrid.training.checkpoint import Checkpointer, load_checkpoint
from megatron_hybrid.training.distributed import is_rank_zero
from megatron_hybrid.training.extras import params_norm
from megatron_hybrid.training.metrics import MetricsWriter, peak_memory_gib, rewound_steps
from megatron_hybrid.training.optimizer import LearningRate, build_optimizer, wrap_data_parallel
from megatron_hybrid.training.profile import StepProfiler
from megatron_hybrid.training.signals import ExitSignals
from megatron_hybrid.training.soundness import (
    Soundness,
    TrainingStoppedError,
    average_in,
    spike_threshold,
)
from megatron_hybrid.training.start import Start
from megatron_hybrid.training.step import BatchShape, Stepper, StepResult
from megatron_hybrid.training.step_metrics import StepMetrics
from megatron_hybrid.training.watchdog import Watchdog

# The ETA goes by the mean of the last steps, this many at most.
RATE_STEPS = 20


class Trainer:
    """One run: built from its config, brought to where its checkpoint stands, then trained.

    All ranks construct it and call `run` together, within `distributed.process_groups`.

    Args:
        config: resolved and valid.
        backend: "torch" or "transformer_engine".
        start: what the run starts from, and its data.
        started: `time.monotonic()` when the run was started, for the exit duration.
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
        self.data, self.carried = start.data, start.carried
        self.steps = start.data.steps
        self._refuse_other_plans()
        engine_config = transformer_config(config, backend, platform.device)
        chunks = build_model_chunks(config, engine_config, backend)
        self.model = wrap_data_parallel(config, engine_config, chunks)
        self.optimizer = build_optimizer(config, engine_config, self.model)
        self.stepper = Stepper(config, self.model, self.optimizer, backend, platform.device)
        self.progress = self._load(start)
        check_batch_sizes(
            config, self.steps, self.progress.consumed_samples, torch.distributed.get_world_size()
        )
        schedule_start_tokens = self.steps.tokens_before(self.progress.schedule_start_samples)
        if schedule_start_tokens:  # not known to the rules before
            validate(config, schedule_start_tokens=schedule_start_tokens)
        self.learning_rate = LearningRate(config, self.optimizer, schedule_start_tokens)
        self.learning_rate.set(self._consumed_tokens())
        POSITION.iteration = self.progress.iteration
        self.recent: list[tuple[float, int]] = []  # seconds and tokens of the last steps

    def _refuse_other_plans(self) -> None:
        """Each rank has planned by itself: the files of their nodes must be the same."""
        if self.data.plan is None:
            return
        digest = hashlib.sha256(self.data.plan.to_json().encode()).hexdigest()
        digests = [""] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise UserError(
                f"ranks {', '.join(map(str, others))} plan other data than rank 0: the token files "
                "of their nodes differ"
            )

    def _load(self, start: Start) -> Progress:
        folder, weights_only, is_own, upcycle = start.origin
        if folder is None:
            return Progress()
        config = self.config
        if is_own:
            whole = config.checkpoint.model_copy(update={"load_optim": True, "load_rng": True})
            goes_on = config.optimizer.model_copy(update={"restart_schedule": False})
            config = config.model_copy(update={"checkpoint": whole, "optimizer": goes_on})
        progress = load_checkpoint(
            config, folder, self.model, self.optimizer, weights_only=weights_only, upcycle=upcycle
        )
        consumed = progress.consumed_samples
        if start.saved_plan is not None and start.saved_plan.consumed_samples != consumed:
            raise UserError(
                f"{folder}/{DATA_PLAN_FILE} is not of this checkpoint: it says that "
                f"{start.saved_plan.consumed_samples} samples were read, the checkpoint {consumed}"
            )
        if is_rank_zero():
            done = "upcycled" if upcycle else "loaded"
            print(f"{done} {folder}: step {progress.iteration}", flush=True)
            if consumed and start.saved_plan is None and self.data.plan is not None:
                print(
                    f"{folder} holds no plan of its data: the run goes on at sample "
                    f"{consumed} of the plan that its config makes, parts of which may have been "
                    "read before in another order",
                    flush=True,
                )
        return progress

    def run(self) -> str:
        """Train to the end, or until a signal or a limit ends the run early.

        Returns:
            Why it ended: "finished", "SIGTERM", "exit_interval", ….

        Raises:
            TrainingStoppedError: the loss or the gradient is not sound, and the config says stop.
        """
        progress, training, steps = self.progress, self.config.training, self.steps
        rewound = rewound_steps(self.config.run_dir, progress.iteration)
        train, valid = open_windows(self.config, self.tokenizer, self.data)
        batches = self._batches(train, steps, progress.consumed_samples)
        with (
            MetricsWriter(
                self.config.run_dir,
                enabled=is_rank_zero(),
                tensorboard=self.config.logging.tensorboard,
                resume_iteration=progress.iteration,
                total_iterations=progress.iteration + steps.steps_from(progress.consumed_samples),
            ) as metrics,
            ExitSignals() as signals,
            Watchdog(log_folder(self.config.run_dir), self.config.training.hang_timeout_s) as dog,
            Soundness(self.config, self.stepper, self.attempt, metrics, progress) as soundness,
        ):
            profiler = StepProfiler(
                self.config, self.stepper, lambda step, line: metrics.event(step, "profile", line)
            )
            if is_rank_zero():
                self.attempt.training(progress.iteration, *rewound)
            checkpointer = Checkpointer(
                self.config, self.model, self.optimizer, self.tokenizer,
                lambda iteration, line: metrics.event(iteration, "checkpoint", line),
                self.data.plan, self.carried,
            )  # fmt: skip
            saved_at = progress.iteration
            reason = "finished"
            if progress.consumed_samples >= steps.samples and is_rank_zero():
                print(f"nothing is left to train: all {steps.samples} samples are read", flush=True)
            while progress.consumed_samples < steps.samples:
                timed = profiler.before(progress.iteration + 1, batches)
                result = self._step(metrics, timed, signals)
                profiler.after(progress.iteration)
                try:
                    soundness.check(progress, result)
                except TrainingStoppedError:
                    checkpointer.finish()  # what was saved while the run was sound
                    raise
                checkpointer.poll()
                dog.beat(progress.iteration)
                if self._due(training.eval_interval):
                    self._evaluate(metrics, valid)
                    dog.beat(progress.iteration)
                ended = self._reason_to_end(result, signals)
                if ended or self._due(self.config.checkpoint.save_interval):
                    self._save(checkpointer, wait=ended is not None)
                    dog.beat(progress.iteration)
                    saved_at = progress.iteration
                if ended:
                    reason = ended
                    metrics.event(progress.iteration, "exit", f"{ended}: saved, ending the run")
                    break
            if saved_at < progress.iteration:
                self._save(checkpointer, wait=True)
            profiler.close(progress.iteration)
            checkpointer.finish()
        if is_rank_zero():
            self.attempt.end(progress.iteration, reason)
        return reason

    def _save(self, checkpointer: Checkpointer, *, wait: bool) -> None:
        started = time.perf_counter()
        checkpointer.save(self.progress, wait=wait)
        if is_rank_zero():
            self.attempt.checkpoint(self.progress.iteration, time.perf_counter() - started)

    def _batches(self, windows: Windows, steps: Steps, consumed_samples: int) -> Iterator[Batch]:
        replica = Replica(
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        )
        return build_iterator(
            windows, steps, self.config, consumed_samples=consumed_samples, replica=replica
        )

    def _step(
        self, metrics: MetricsWriter, batches: Iterator[Batch], signals: ExitSignals
    ) -> StepResult:
        """One step: trained, counted and reported.

        The learning rate and the data go on whether or not it was applied.
        """
        started, progress = time.perf_counter(), self.progress
        threshold = spike_threshold(self.config.training, progress)
        first_sample, learning_rate = progress.consumed_samples, self.learning_rate.current()
        shape = BatchShape(self.steps.batch_size(first_sample), self.steps.seq_length(first_sample))
        interval = self.config.logging.float8_interval
        result = self.stepper.train(
            batches, shape, threshold, self._votes(signals),
            count_float8=interval is not None and (progress.iteration + 1) % interval == 0,
        )  # fmt: skip
        progress.iteration += 1
        POSITION.iteration = progress.iteration
        progress.consumed_samples += shape.samples
        self.learning_rate.set(self._consumed_tokens())
        if result.refusal is None:
            average_in(progress, result.loss)
        seconds = time.perf_counter() - started
        self.recent = [*self.recent, (seconds, shape.tokens)][-RATE_STEPS:]
        if result.refusal is not None or self._due(self.config.training.log_interval):
            metrics.train(self._metrics(result, shape, learning_rate, seconds))
        if result.float8 is not None:
            metrics.float8(progress.iteration, self._consumed_tokens(), result.float8)
        if result.expert_load is not None and self._due(self.config.logging.expert_load_interval):
            metrics.expert_load(progress.iteration, self._consumed_tokens(), result.expert_load)
        return result

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
        if self._due(self.config.training.exit_interval):
            return "exit_interval"
        return None

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _consumed_tokens(self) -> int:
        return self.steps.tokens_before(self.progress.consumed_samples)

    def _evaluate(self, metrics: MetricsWriter, windows: Windows | None) -> None:
        """The loss on the held-out samples, the same ones each time."""
        steps = self.data.valid_steps
        assert windows is not None and steps is not None
        shape = BatchShape(steps.batch_size(0), steps.seq_length(0))
        shapes = [shape] * (steps.samples // shape.samples)
        loss = self.stepper.evaluate(self._batches(windows, steps, 0), shapes)
        progress = self.progress
        metrics.validation(
            progress.iteration, progress.consumed_samples, self._consumed_tokens(), loss
        )

    def _metrics(
        self, result: StepResult, shape: BatchShape, learning_rate: float, seconds: float
    ) -> StepMetrics:
        progress, consumed_tokens = self.progress, self._consumed_tokens()
        tokens_per_s = shape.tokens / seconds
        flops = flops_per_token(self.config.model, shape.seq_length).total
        seconds_per_token = sum(s for s, _ in self.recent) / sum(n for _, n in self.recent)
        extra = dict(result.moe_losses)
        if self.config.logging.log_params_norm:
            extra["params_norm"] = params_norm(self.optimizer)
        uses = self.data.consumed(progress.consumed_samples)
        return StepMetrics(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=consumed_tokens,
            loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_s=tokens_per_s,
            model_tflops_per_rank=tokens_per_s * flops / torch.distributed.get_world_size() / 1e12,
            step_ms=seconds * 1000,
            peak_memory_gib=peak_memory_gib(self.device),
            eta_s=(self.steps.tokens - consumed_tokens) * seconds_per_token,
            skipped=result.refusal is not None,
            nonfinite=result.refusal == "nonfinite",
            phase=self.data.phase(progress.consumed_samples - 1),
            source_tokens={use.name: use.tokens for use in uses},
            source_epochs={use.name: use.epochs for use in uses},
            expert_load=result.expert_load,
            extra=extra,
        )
