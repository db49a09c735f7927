"""A step's figures, worked out and handed to those who write them."""

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_hybrid.config.phases import sequence_lengths
from megatron_hybrid.objectives.registry import step_flops_per_token
from megatron_hybrid.training.callbacks.base import Callback, Step
from megatron_hybrid.training.metrics import peak_memory_gib
from megatron_hybrid.training.step_metrics import StepMetrics

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer

# The ETA goes by the mean of the last steps, this many at most.
RATE_STEPS = 20


class Figures(Callback):
    """Makes `StepMetrics` of the steps that are due, with what the other callbacks add."""

    def __init__(self) -> None:
        self._recent: list[tuple[float, int]] = []  # seconds and tokens of the last steps
        self._flops: dict[int, float] = {}  # of a token, by the length of its sequence

    def on_run_start(self, run: "Trainer") -> None:
        """Count FLOPs while the files of a teacher are there, which later steps do not need."""
        lengths = set(sequence_lengths(run.config))
        self._flops = {length: step_flops_per_token(run.config, length) for length in lengths}

    def after_step(self, run: "Trainer", step: Step) -> None:
        self._recent = [*self._recent, (step.seconds, step.shape.tokens)][-RATE_STEPS:]
        if step.due:
            run.callbacks.on_metrics(run, self._metrics(run, step))

    def _metrics(self, run: "Trainer", step: Step) -> StepMetrics:
        progress, result = run.progress, step.result
        consumed_tokens = run.consumed_tokens()
        tokens_per_s = step.shape.tokens / step.seconds
        flops = self._flops[step.shape.seq_length]
        seconds_per_token = sum(s for s, _ in self._recent) / sum(n for _, n in self._recent)
        uses = run.data.consumed(progress.consumed_samples)
        losses = result.readings.get("moe_losses", {})
        known = {"the router": losses, "training.objective": result.reports}
        return StepMetrics(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=consumed_tokens,
            loss=result.loss,
            learning_rate=step.learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_s=tokens_per_s,
            model_tflops_per_rank=tokens_per_s * flops / dist.get_world_size() / 1e12,
            step_ms=step.seconds * 1000,
            peak_memory_gib=peak_memory_gib(run.device),
            eta_s=(run.steps.tokens - consumed_tokens) * seconds_per_token,
            skipped=result.refusal is not None,
            nonfinite=result.refusal == "nonfinite",
            phase=run.data.phase(progress.consumed_samples - 1),
            source_tokens={use.name: use.tokens for use in uses},
            source_epochs={use.name: use.epochs for use in uses},
            expert_load=result.readings.get("expert_load"),
            extra=run.callbacks.metrics(run, step, known),
        )
