"""One training step and one evaluation on megatron-core's schedules.

Legend: b micro batch, s sequence of this rank (with packed documents: one row of b * s tokens).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
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
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.model.float8 import end_step, float8_linears
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
        loss: mean cross-entropy over the tokens of the global batch, in nats.
        grad_norm: of the mean loss, before clipping; NaN where the loss was not finite.
        refusal: why the optimizer was not stepped ("nonfinite", "loss_spike"), or None.
        votes: sums over ranks of the flags that the caller handed in.
        readings: of the meters of the model, by their names.
    """

    loss: float
    grad_norm: float
    refusal: str | None
    votes: list[float]
    readings: dict[str, Any]


class Stepper:
    """Runs steps of one model: forward and backward of all micro batches, then the update.

    Args:
        model: this rank's pipeline chunks under DDP.
        backend: decides how packed documents reach attention.
    """

    def __init__(
        self,
        config: RunConfig,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        backend: str,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.device = device
        self.watch: StepWatch | None = None  # while a step is looked for that was not finite
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
        loss, (agreed, *found) = self._reduce(sums, [sums.new_tensor(votes), *shares])
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
        return StepResult(loss, grad_norm, refusal, agreed, readings)

    @torch.no_grad()
    def evaluate(self, data: Iterator[Batch], shapes: Iterable[BatchShape]) -> float:
        """Mean loss in nats a token over the next global batches, of these shapes."""
        for chunk in self.model:
            chunk.eval()
        sums = [self._run(data, shape, forward_only=True) for shape in shapes]
        loss, _ = self._reduce(torch.stack(sums).sum(dim=0), [])
        return loss

    def _micro_batches(self, shape: BatchShape) -> int:
        """Of a global batch, on each data-parallel rank."""
        replicas = parallel_state.get_data_parallel_world_size()
        count, rest = divmod(shape.samples, self.config.training.micro_batch_size * replicas)
        assert rest == 0, "checked when the run began"
        return count

    def _run(self, data: Iterator[Batch], shape: BatchShape, forward_only: bool) -> Tensor:
        """All micro batches of a global batch -> `[2]` float64: sum of losses, number of tokens."""
        micro_batch_size = self.config.training.micro_batch_size
        row_of = micro_batch_size if self.config.data.packed_documents else 1
        iterators = [data] if len(self.model) == 1 else list(tee(data, len(self.model)))
        per_micro_batch = self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators[0] if len(self.model) == 1 else iterators,
            model=self.model[0] if len(self.model) == 1 else self.model,
            num_microbatches=self._micro_batches(shape),
            seq_length=shape.seq_length * row_of,
            micro_batch_size=micro_batch_size // row_of,
            forward_only=forward_only,
        )
        if not per_micro_batch:  # not the last pipeline stage
            return torch.zeros(2, dtype=torch.float64, device=self.device)
        return torch.stack(per_micro_batch).sum(dim=0)

    def _forward(
        self, data: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[Tensor, partial[tuple[Tensor, Tensor, Tensor]]]:
        """The engine's forward_step_func: losses `[b, s]` and how to add them up."""
        batch = next(data)
        local = get_batch_on_this_cp_rank(
            {
                "tokens": batch.tokens.to(self.device, non_blocking=True),
                "labels": batch.labels.to(self.device, non_blocking=True),
                "loss_mask": batch.loss_mask.to(self.device, non_blocking=True),
                "position_ids": batch.position_ids.to(self.device, non_blocking=True),
            },
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        losses = model(
            local["tokens"],
            local["position_ids"],
            None,
            labels=local["labels"],
            packed_seq_params=packed_seq_params(batch, self.backend, self.device),
        )
        return losses, partial(_sum_of_losses, local["loss_mask"], watch=self.watch)

    def _reduce(self, sums: Tensor, others: list[Tensor]) -> tuple[float, list[list[float]]]:
        """Add up losses, tokens and other numbers `[n]` over all ranks at once.

        One reduction a step: it is also where the ranks agree.

        Returns:
            The mean loss, and the sums of each of `others`.
        """
        # Only one TP rank of a replica counts; stages but the last have zeros already.
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            sums = torch.zeros_like(sums)
        packed = torch.cat([sums, *others])
        dist.all_reduce(packed)
        numbers = iter(packed.tolist())
        loss_sum, tokens = islice(numbers, 2)
        return loss_sum / max(tokens, 1.0), [list(islice(numbers, len(each))) for each in others]


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


def _sum_of_losses(
    loss_mask: Tensor, losses: Tensor, *, watch: StepWatch | None
) -> tuple[Tensor, Tensor, Any]:
    """Losses `[b, s]` -> their sum, the number of tokens, and both for the report.

    The engine divides the gradient by the number of tokens of the global batch.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    if watch is not None:
        watch.check_loss(loss)
    tokens = mask.sum()
    report = torch.stack([loss.detach().double(), tokens.double()])
    return loss, tokens.to(torch.int), report
