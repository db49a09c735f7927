"""One training step and one evaluation on megatron-core's schedules.

Legend: b micro batch, s sequence of this rank (with packed documents: one row of b * s tokens).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, tee
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank, unwrap_model
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.errors import UserError
from megatron_hybrid.model.float8 import end_step, float8_linears
from megatron_hybrid.objectives.registry import build_objective
from megatron_hybrid.training.callbacks.base import Evaluation
from megatron_hybrid.training.meters import build_meters
from megatron_hybrid.training.optimizer import apply_gradients, gradient_norm
from megatron_hybrid.training.rerun import StepWatch


class BatchShape(NamedTuple):
    """Of a global batch: how many samples, of how many tokens each."""

    samples: int
    seq_length: int

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_length


class StepResult(NamedTuple):
    """What a step found; the same on every rank.

    Attributes:
        loss: what was minimised, over the global batch.
        grad_norm: of the mean loss, before clipping; NaN where the loss was not finite.
        refusal: why the optimizer was not stepped ("nonfinite", "loss_spike"), or None.
        votes: sums over ranks of the flags that the caller handed in.
        reports: what else the objective found.
        readings: of the meters of the model, by their names.
    """

    loss: float
    grad_norm: float
    refusal: str | None
    votes: list[float]
    reports: dict[str, float]
    readings: dict[str, Any]


class Stepper:
    """Runs steps of one model: forward and backward of all micro batches, then the update.

    Args:
        model: this rank's pipeline chunks under DDP.
        backend: decides how packed documents reach attention.
        sources: names of those of the data, as far as they have any.
    """

    def __init__(
        self,
        config: RunConfig,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        backend: str,
        device: torch.device,
        sources: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.device = device
        self.watch: StepWatch | None = None  # while a step is looked for that was not finite
        self.objective = build_objective(config)
        self.objective.open(backend, device, sources)
        self._schedule = get_forward_backward_func()
        self._meters = build_meters(config.model, model)
        self._float8_linears = float8_linears(model)
        self._expert_biases = [
            module.expert_bias
            for chunk in model
            for module in chunk.modules()
            if getattr(module, "expert_bias", None) is not None
        ]

    def train(
        self,
        data: Iterator[Batch],
        shape: BatchShape,
        spike_above: float,
        votes: list[float],
    ) -> StepResult:
        """One step of the optimizer on the next global batch.

        The update is refused where the loss or the gradient is not finite, or the loss exceeds
        `spike_above`; parameters and optimizer are then as they were.

        Args:
            data: micro batches of this rank, those of this global batch next.
            shape: of the global batch.
            votes: flags of this rank, summed over ranks on the way.
        """
        # The engine moves them with the backward pass, before anyone has seen the loss.
        expert_biases = [bias.clone() for bias in self._expert_biases]
        for micro_batches in [data] if self.watch is None else self.watch.passes(data):
            for chunk in self.model:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            _put_back(self._expert_biases, expert_biases)
            sums = self._run(micro_batches, shape, forward_only=False)
            shares = [meter.take(self._micro_batches(shape), sums) for meter in self._meters]
        end_step(self._float8_linears)
        (loss, reports), (agreed, *found) = self._reduce(sums, [sums.new_tensor(votes), *shares])
        grad_norm = gradient_norm(self.optimizer) if math.isfinite(loss) else math.nan
        if not math.isfinite(grad_norm) or (self.watch is not None and self.watch.findings):
            refusal = "nonfinite"
        elif loss > spike_above:
            refusal = "loss_spike"
        else:
            refusal = None
            apply_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
        if refusal is not None:
            _put_back(self._expert_biases, expert_biases)
        readings = {
            meter.name: meter.read(sums) for meter, sums in zip(self._meters, found, strict=True)
        }
        return StepResult(loss, grad_norm, refusal, agreed, reports, readings)

    @torch.no_grad()
    def evaluate(self, data: Iterator[Batch], shapes: Iterable[BatchShape]) -> Evaluation:
        """The loss over the next global batches, of these shapes."""
        for chunk in self.model:
            chunk.eval()
        sums = [self._run(data, shape, forward_only=True) for shape in shapes]
        (loss, reports), _ = self._reduce(torch.stack(sums).sum(dim=0), [])
        return Evaluation(loss, self.objective.is_cross_entropy, reports)

    def _micro_batches(self, shape: BatchShape) -> int:
        """Of a global batch, on each data-parallel rank."""
        replicas = parallel_state.get_data_parallel_world_size()
        count, rest = divmod(shape.samples, self.config.training.micro_batch_size * replicas)
        assert rest == 0, "checked when the run began"
        return count

    def _run(self, data: Iterator[Batch], shape: BatchShape, forward_only: bool) -> Tensor:
        """All micro batches of a global batch -> `[2 + n]` float64: sum of losses, what it is to be
        divided by, and the n sums that the objective reports."""
        micro_batch_size = self.config.training.micro_batch_size
        row_of = micro_batch_size if self.config.data.packed_documents else 1
        count = self._micro_batches(shape)
        data = map(self.objective.prepare, islice(data, count))
        if self.objective.looks_ahead:
            micro_batches = list(data)
            self.objective.look_ahead(micro_batches, held_out=forward_only)
            data = iter(micro_batches)
        iterators = [data] if len(self.model) == 1 else list(tee(data, len(self.model)))
        per_micro_batch = self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators[0] if len(self.model) == 1 else iterators,
            model=self.model[0] if len(self.model) == 1 else self.model,
            num_microbatches=count,
            seq_length=shape.seq_length * row_of + self.config.model.num_meta_tokens,
            micro_batch_size=micro_batch_size // row_of,
            forward_only=forward_only,
        )
        names = ["loss", "count", *self.objective.reports]
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if per_micro_batch:  # the last pipeline stage
            sums += torch.stack(per_micro_batch).sum(dim=0)
        for name, total in self.objective.beside().items():
            sums[names.index(name)] += total
        return sums

    def _forward(
        self, data: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[Tensor, partial[tuple[Tensor, Tensor, Tensor]]]:
        """The engine's forward_step_func: the output, and what the last stage makes of it."""
        batch = next(data).after(self.config.model.num_meta_tokens)
        local = local_batch(batch, self.device)
        wanted = self.objective.output
        with ExitStack() as around:
            if wanted == "hidden":
                around.enter_context(without_output_layer(model))
            around.enter_context(self.objective.watching(local, unwrap_model(model)))
            output = model(
                local.tokens,
                local.position_ids,
                None,
                labels=local.labels if wanted == "losses" else None,
                packed_seq_params=packed_seq_params(batch, self.backend, self.device),
                **self.objective.inputs(local),
            )
        return output, partial(self._add_up, local, model)

    def _add_up(
        self, batch: Batch, model: torch.nn.Module, output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model's output -> the sum of losses, what it is to be divided by, and all sums for
        the report. The engine divides the gradient by what all ranks count together.
        """
        found = self.objective.losses(output, batch, unwrap_model(model))
        if found.values.shape != found.weights.shape:
            raise UserError(
                f"training.objective={self.config.training.objective} gives values of shape "
                f"{list(found.values.shape)} with weights of {list(found.weights.shape)}; allowed: "
                "a weight for each value, of the same shape"
            )
        weights = found.weights.detach().reshape(-1).float()
        loss = (found.values.reshape(-1).float() * weights).sum()
        if self.watch is not None:
            self.watch.check_loss(loss)
        count = weights.sum() if found.count is None else found.count
        sums = [loss, count, *(found.sums[name] for name in self.objective.reports)]
        report = torch.stack([each.detach().double() for each in sums])
        return loss, count.to(torch.int), report

    def _reduce(
        self, sums: Tensor, others: list[Tensor]
    ) -> tuple[tuple[float, dict[str, float]], list[list[float]]]:
        """Add up what `_run` returns and other numbers `[n]` over all ranks at once.

        One reduction a step: it is also where the ranks agree.

        Returns:
            The loss and the objective's report, and the sums of each of `others`.
        """
        # Only one TP rank of a replica counts; stages but the last have zeros already.
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            sums = torch.zeros_like(sums)
        packed = torch.cat([sums, *others])
        dist.all_reduce(packed)
        numbers = iter(packed.tolist())
        loss_sum, count, *reported = islice(numbers, len(sums))
        if math.isfinite(count) and not count.is_integer():  # the engine has divided by its floor
            raise UserError(
                f"training.objective={self.config.training.objective} divides by {count:g}, the "
                "sum of its counts or weights; allowed: a whole number, as Losses.count"
            )
        found = loss_sum / max(count, 1.0), self.objective.report(reported, count)
        return found, [list(islice(numbers, len(each))) for each in others]


def local_batch(batch: Batch, device: torch.device) -> Batch:
    """A micro batch as this context parallel rank has it, on the device."""
    whole = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "loss_mask": batch.loss_mask,
        "position_ids": batch.position_ids,
        **batch.extra,
    }
    local = get_batch_on_this_cp_rank(
        {name: value.to(device, non_blocking=True) for name, value in whole.items()},
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    extra = {name: local.pop(name) for name in batch.extra}
    return replace(batch, **local, extra=extra)


def packed_seq_params(batch: Batch, backend: str, device: torch.device) -> PackedSeqParams | None:
    """How the layers learn of documents: None where the batch is not packed.

    Torch's attention and every scan read `seq_idx` of the row as it stands; RoPE then runs through
    the whole row, which leaves attention within a document as it is, RoPE being relative.
    Transformer Engine reads the documents' boundaries.
    """
    if batch.seq_idx is None:
        return None
    seq_idx = batch.seq_idx.to(device, non_blocking=True)
    if backend == "torch":
        length = batch.tokens.shape[1]
        return PackedSeqParams(
            qkv_format="sbhd", seq_idx=seq_idx, max_seqlen_q=length, max_seqlen_kv=length
        )
    assert batch.cu_seqlens is not None
    cu_seqlens = batch.cu_seqlens.to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        seq_idx=seq_idx,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def _put_back(tensors: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    for tensor, before in zip(tensors, saved, strict=True):
        tensor.copy_(before)


@contextmanager
def without_output_layer(model: torch.nn.Module) -> Iterator[None]:
    """Within it, the model's output is its last hidden states."""
    inner = unwrap_model(model)
    had, inner.post_process = inner.post_process, False
    try:
        yield
    finally:
        inner.post_process = had
