"""Objectives as a user has them: outside of the package, named in a config."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from megatron_hybrid.config.base import PositiveReal, Section
from megatron_hybrid.objectives import Losses, Objective
from megatron_hybrid.training.callbacks.base import Callback


class NextByHidden(Objective):
    """Pre-training's, by hand from hidden states."""

    output = "hidden"

    def losses(self, output: Any, batch: Any, model: Any) -> Losses:
        weight = model.shared_embedding_or_output_weight()
        if not model.share_embeddings_and_output_weights:
            weight = None
        logits, _ = model.output_layer(output, weight=weight)
        return Losses(model.compute_language_model_loss(batch.labels, logits), batch.loss_mask)


class Weighted(Objective):
    """By sequence: the mean cross-entropy of a sample, times a factor of the sample's own; plus a
    term that keeps logits small. It wants logits, and has an option and a report."""

    output = "logits"
    reports = ("small", "factors")

    class Options(Section):
        small: PositiveReal = Field(description="weight of the term that keeps logits small")

    @classmethod
    def problems(cls, config: Any, options: Any) -> Iterator[str]:
        if config.parallel.tensor_model_parallel_size > 1:
            yield "parallel.tensor_model_parallel_size must be 1"

    def prepare(self, batch: Any) -> Any:
        assert batch.samples is not None
        factors = torch.tensor([[1.0 + sample % 3] for sample in batch.samples])
        return replace(batch, extra={"factors": factors.expand(batch.tokens.shape)})

    def losses(self, output: Any, batch: Any, model: Any) -> Losses:
        tokens = F.cross_entropy(output.transpose(1, 2), batch.labels, reduction="none")
        small = output.logsumexp(-1).square()
        values = (tokens + self.options.small * small).mean(1)
        factors = batch.extra["factors"][:, 0]
        return Losses(
            values, factors, count=torch.tensor(len(values)),
            sums={"small": small.mean(1).sum(), "factors": factors.sum()},
        )  # fmt: skip

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        small, factors = sums
        return {"small": small / count, "samples": count, "mean_factor": factors / count}


class Counted(Objective):
    """Of next tokens; it counts its steps."""

    next_tokens = True

    def after_step(self, reports: Mapping[str, float]) -> None:
        self.state = {"steps": self.state.get("steps", 0.0) + 1.0}


class WithoutTeacher(Callback):
    """Removes the teacher's files after the first step."""

    def after_step(self, run: Any, step: Any) -> None:
        shutil.rmtree(run.config.training.objective_options["teacher"], ignore_errors=True)


class NoObjective:
    """Something else."""
