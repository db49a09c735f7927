"""The training loop: read from top to bottom, it is what a run does."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.lengths import lengths
from megatron_hybrid.config.tracker import CONFIG_FILE
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.blend import build_datasets
from megatron_hybrid.data.loader import build_iterator
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.data.windows import Windows
from megatron_hybrid.errors import UserError
from megatron_hybrid.model.build import build_model_chunks
from megatron_hybrid.model.counts import flops_per_token
from megatron_hybrid.model.transformer_config import transformer_config
from megatron_hybrid.platform import Platform
from megatron_hybrid.training import checkpoint_files
from megatron_hybrid.training.checkpoint import Checkpointer, Progress, load_checkpoint
from megatron_hybrid.training.distributed import is_rank_zero
from megatron_hybrid.training.extras import params_norm
from megatron_hybrid.training.metrics import MetricsWriter, peak_memory_gib
from megatron_hybrid.training.optimizer import (
    build_optimizer,
    build_scheduler,
    wrap_data_parallel,
)
from megatron_hybrid.training.signals import ExitSignals
from megatron_hybrid.training.step import Stepper, StepResult
from megatron_hybrid.training.step_metrics import StepMetrics

# Loss spikes are measured against an exponential mean over about this many steps.
LOSS_AVERAGE_STEPS = 50
# The ETA goes by the mean of the last steps, this many at most.
RATE_STEPS = 20


class TrainingStoppedError(UserError):
    """The run ended because its loss or gradient was no longer sound."""


class Trainer:
    """One run: built from its config, brought to where its checkpoint stands, then trained.

    All ranks construct it and call `run` together, within `distributed.process_groups`.

    Args:
        config: resolved and valid.
        backend: "torch" or "transformer_engine".
        started: `time.monotonic()` when the run was started, for the exit duration.
    """

    def __init__(
        self,
        config: RunConfig,
        platform: Platform,
        backend: str,
        tokenizer: Tokenizer,
        started: float,
    ) -> None:
        self.config = config
        self.device = platform.device
        self.tokenizer = tokenizer
        self.started = started
        self.length = lengths(config)
        engine_config = transformer_config(config, backend, platform.device)
        chunks = build_model_chunks(config, engine_config, backend)
        self.model = wrap_data_parallel(config, engine_config, chunks)
        self.optimizer = build_optimizer(config, engine_config, self.model)
        self.stepper = Stepper(config, self.model, self.optimizer, backend, platform.device)
        self.flops_per_token = flops_per_token(config.model, config.data.seq_length).total
        self.progress = self._load()
        self.scheduler = build_scheduler(config, self.optimizer, self.progress.consumed_samples)
        self.step_seconds: list[float] = []

    def _load(self) -> Progress:
        """Go on with this run's own checkpoint, else start from `checkpoint.load`, else anew."""
        config, options = self.config, self.config.checkpoint
        assert options.save is not None
        folder = checkpoint_files.latest_checkpoint(options.save)
        starts_elsewhere = (
            options.load is not None and options.load.resolve() != options.save.resolve()
        )
        weights_only = options.finetune
        if folder is None:
            if options.load is None:
                return Progress()
            folder = checkpoint_files.latest_checkpoint(options.load)
            if folder is None:
                raise UserError(f"checkpoint.load={options.load} holds no checkpoint")
        elif starts_elsewhere:
            # The fields say how the run began; what it saved itself is taken up whole.
            weights_only = False
            whole = options.model_copy(update={"load_optim": True, "load_rng": True})
            config = config.model_copy(update={"checkpoint": whole})
        elif weights_only:
            raise UserError(
                f"checkpoint.finetune=true cannot start from checkpoint.load={options.load}, the "
                "folder that this run saves to; give the new run a run_dir of its own"
            )
        progress = load_checkpoint(
            config, folder, self.model, self.optimizer, weights_only=weights_only
        )
        if not weights_only and (folder / CONFIG_FILE).exists():
            self._refuse_other_tokenizer(folder)
        if is_rank_zero():
            print(f"loaded {folder}: step {progress.iteration}", flush=True)
        return progress

    def _refuse_other_tokenizer(self, folder: Path) -> None:
        """Other ids for the same words would be learned without a word of warning."""
        if load_tokenizer(folder).fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer_model={self.config.data.tokenizer_model} is not the tokenizer of "
                f"{folder}, which is there as a copy; checkpoint.finetune=true may change it"
            )

    def run(self) -> str:
        """Train to the end, or until a signal or a limit ends the run early.

        Returns:
            Why it ended: "finished", "SIGTERM", "exit_interval", ….

        Raises:
            TrainingStoppedError: the loss or the gradient is not sound, and the config says stop.
        """
        progress, training = self.progress, self.config.training
        datasets = build_datasets(self.config, self.tokenizer)
        data = self._iterator(datasets[0], progress.consumed_samples)
        with (
            MetricsWriter(
                self.config.run_dir,
                enabled=is_rank_zero(),
                tensorboard=self.config.logging.tensorboard,
                resume_iteration=progress.iteration,
                total_iterations=self.length.train_iters,
            ) as metrics,
            ExitSignals() as signals,
        ):
            checkpointer = Checkpointer(
                self.config, self.model, self.optimizer, self.tokenizer,
                report=lambda iteration, line: metrics.event(iteration, "checkpoint", line),
            )  # fmt: skip
            saved_at = progress.iteration
            reason = "finished"
            while progress.iteration < self.length.train_iters:
                step_started = time.perf_counter()
                learning_rate = self._learning_rate()
                result = self.stepper.train(data, self._spike_threshold(), self._votes(signals))
                self._account(result)
                self._log(metrics, result, learning_rate, time.perf_counter() - step_started)
                if unsound := self._unsound(result):
                    checkpointer.finish()  # what was saved while the run was sound
                    raise TrainingStoppedError(unsound)
                checkpointer.poll()
                if self._due(training.eval_interval):
                    self._evaluate(metrics, datasets[1])
                ended = self._reason_to_end(result, signals)
                if ended or self._due(self.config.checkpoint.save_interval):
                    checkpointer.save(progress, wait=ended is not None)
                    saved_at = progress.iteration
                if ended:
                    reason = ended
                    metrics.event(progress.iteration, "exit", f"{ended}: saved, ending the run")
                    break
            if saved_at < progress.iteration:
                checkpointer.save(progress)
            checkpointer.finish()
        return reason

    def _iterator(self, dataset: Windows | None, consumed_samples: int) -> Iterator[Batch]:
        assert dataset is not None
        return build_iterator(
            dataset,
            self.config,
            consumed_samples=consumed_samples,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )

    def _account(self, result: StepResult) -> None:
        """Count the step; the learning rate and the data go on whether or not it was applied."""
        progress, batch = self.progress, self.config.training.global_batch_size
        progress.iteration += 1
        progress.consumed_samples += batch
        self.scheduler.step(batch)
        if result.refusal is None:
            previous = progress.loss_average
            progress.loss_average = (
                result.loss
                if previous is None
                else previous + (result.loss - previous) / LOSS_AVERAGE_STEPS
            )

    def _spike_threshold(self) -> float:
        """The loss above which a step is a spike."""
        factor, average = self.config.training.loss_spike_factor, self.progress.loss_average
        return math.inf if factor is None or average is None else factor * average

    def _unsound(self, result: StepResult) -> str | None:
        """Why the run must not go on; None where it may."""
        training, iteration = self.config.training, self.progress.iteration
        if result.refusal == "nonfinite" and training.nonfinite_action == "stop":
            return (
                f"step {iteration}: loss={result.loss} and grad_norm={result.grad_norm}, at least "
                "one not finite; nothing was updated or saved. Resume from the last checkpoint "
                "with a lower optimizer.lr, or pass over such steps with "
                "training.nonfinite_action=skip"
            )
        if result.refusal == "loss_spike" and training.loss_spike_action == "stop":
            return (
                f"step {iteration}: loss={result.loss:.4f} is over training.loss_spike_factor="
                f"{training.loss_spike_factor} times its mean {self.progress.loss_average:.4f}; "
                "nothing was updated or saved. Pass over such steps with "
                "training.loss_spike_action=skip"
            )
        return None

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

    def _learning_rate(self) -> float:
        return float(self.scheduler.get_lr(self.optimizer.param_groups[0]))

    def _evaluate(self, metrics: MetricsWriter, dataset: Windows | None) -> None:
        data = self._iterator(dataset, 0)
        loss = self.stepper.evaluate(data, self.config.training.eval_iters)
        samples = self.progress.consumed_samples
        metrics.validation(
            self.progress.iteration, samples, samples * self.config.data.seq_length, loss
        )

    def _log(
        self, metrics: MetricsWriter, result: StepResult, learning_rate: float, seconds: float
    ) -> None:
        progress, seq_length = self.progress, self.config.data.seq_length
        self.step_seconds = [*self.step_seconds, seconds][-RATE_STEPS:]
        if result.refusal is None and not self._due(self.config.training.log_interval):
            return
        tokens_per_s = self.config.training.global_batch_size * seq_length / seconds
        world_size = torch.distributed.get_world_size()
        mean_seconds = sum(self.step_seconds) / len(self.step_seconds)
        extra = dict(result.moe_losses)
        if self.config.logging.log_params_norm:
            extra["params_norm"] = params_norm(self.optimizer)
        metrics.train(
            StepMetrics(
                iteration=progress.iteration,
                consumed_samples=progress.consumed_samples,
                consumed_tokens=progress.consumed_samples * seq_length,
                loss=result.loss,
                learning_rate=learning_rate,
                grad_norm=result.grad_norm,
                tokens_per_s=tokens_per_s,
                model_tflops_per_rank=tokens_per_s * self.flops_per_token / world_size / 1e12,
                step_ms=seconds * 1000,
                peak_memory_gib=peak_memory_gib(self.device),
                eta_s=(self.length.train_iters - progress.iteration) * mean_seconds,
                skipped=result.refusal is not None,
                nonfinite=result.refusal == "nonfinite",
                extra=extra,
            )
        )
