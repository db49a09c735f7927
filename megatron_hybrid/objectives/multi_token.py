"""Multi-token prediction: beside what an objective asks of the next token, the tokens after it.

Legend: b samples of the micro batch (with packed documents: one row), s tokens of this context
parallel rank, D modules of `model.mtp_num_layers`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_hybrid.objectives.base import Losses, Objective

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from megatron_hybrid.data.batch import Batch


class MultiToken(Objective):
    """Another objective, to whose gradient that of the prediction modules is added.

    `mtp_loss_scaling_factor / D` times the sum, over modules k and tokens i, of the loss of token
    i + 1 + k, where that is of i's document and the objective asks for it; divided by what the
    objective's loss is divided by (DeepSeek-V3, 2412.19437, eq. 24 and 25). So it is the same
    however samples fall on ranks and micro batches; megatron-core divides by the tokens that a
    micro batch of a rank has left. The loss of a step is the objective's alone, and evaluations
    have no such losses.
    """

    def __init__(self, objective: Objective) -> None:
        self.inner = objective
        super().__init__(objective.config, objective.options)
        model = self.config.model
        assert model.mtp_num_layers is not None
        self.modules = range(1, model.mtp_num_layers + 1)
        self.factor = model.mtp_loss_scaling_factor / model.mtp_num_layers
        self.is_cross_entropy = objective.is_cross_entropy  # type: ignore[misc]
        self.conversations = objective.conversations  # type: ignore[misc]
        self.by_source = objective.by_source  # type: ignore[misc]
        self.looks_ahead = objective.looks_ahead  # type: ignore[misc]

    @property
    def state(self) -> dict[str, float]:
        """The objective's own: a resumed run's is there before its first step."""
        return self.inner.state

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        self.inner.state = state

    def open(self, backend: str, device: "torch.device", sources: Sequence[str]) -> None:
        self.inner.open(backend, device, sources)
        names = [(f"mtp_{k}_loss", f"mtp_{k}_tokens") for k in self.modules]
        self.reports = (*self.inner.reports, *(name for pair in names for name in pair))

    def parameters(self, model: "nn.Module") -> "nn.Module | None":
        return self.inner.parameters(model)

    def watching(self, batch: "Batch", model: "nn.Module") -> AbstractContextManager[None]:
        return self.inner.watching(batch, model)

    def beside(self) -> Mapping[str, "Tensor"]:
        return self.inner.beside()

    def after_step(self, reports: Mapping[str, float]) -> None:
        self.inner.after_step(reports)

    def look_ahead(self, micro_batches: Sequence["Batch"], *, held_out: bool) -> None:
        self.inner.look_ahead(micro_batches, held_out=held_out)

    def prepare(self, batch: "Batch") -> "Batch":
        """With what each module reads, is to predict, and may."""
        batch = self.inner.prepare(batch)
        extra = dict(batch.extra)
        for k in self.modules:
            same = _same_document(batch, k)
            extra |= {
                f"mtp_{k}_tokens": _ahead(batch.tokens, k) * same,
                f"mtp_{k}_labels": _ahead(batch.labels, k) * same,
                f"mtp_{k}_mask": _ahead(batch.loss_mask, k) * same,
            }
        return replace(batch, extra=extra)

    def inputs(self, batch: "Batch") -> Mapping[str, Any]:
        """Nothing in an evaluation."""
        import torch

        if not torch.is_grad_enabled():
            return {}
        names = ("tokens", "labels")
        return {
            "ahead": [tuple(batch.extra[f"mtp_{k}_{name}"] for name in names) for k in self.modules]
        }

    def losses(self, output: "Tensor", batch: "Batch", model: "nn.Module") -> Losses:
        import torch
        from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

        if not torch.is_grad_enabled():
            found = self.inner.losses(output, batch, model)
            nothing = output.new_zeros(())
            of_modules = dict.fromkeys(self.reports[len(self.inner.reports) :], nothing)
            return replace(found, sums={**found.sums, **of_modules})
        found = self.inner.losses(output[0], batch, model)
        sums, values = dict(found.sums), found.values
        for k in self.modules:
            mask = batch.extra[f"mtp_{k}_mask"]
            weighted = output[k] * mask
            sums |= {f"mtp_{k}_loss": weighted.sum().detach(), f"mtp_{k}_tokens": mask.sum()}
            # Its gradient alone goes on, beside that of the loss.
            values = MTPLossAutoScaler.apply(values, self.factor * weighted)
        return replace(found, values=values, sums=sums)

    def report(self, sums: Sequence[float], count: float) -> dict[str, float]:
        """The objective's, and the mean loss of each module, in nats; none of an evaluation."""
        own = len(self.inner.reports)
        found = self.inner.report(sums[:own], count)
        pairs = zip(self.modules, sums[own::2], sums[own + 1 :: 2], strict=True)
        return found | {f"mtp_{k}_loss": total / tokens for k, total, tokens in pairs if tokens}


def _ahead(values: "Tensor", k: int) -> "Tensor":
    """`[b, s]` -> what stands k places on in each row, and 0 at the end."""
    moved = values.new_zeros(values.shape)
    moved[:, :-k] = values[:, k:]
    return moved


def _same_document(batch: "Batch", k: int) -> "Tensor":
    """Whether the token k places on is of the same document: `[b, s]` bool."""
    import torch

    same = torch.ones_like(batch.tokens, dtype=torch.bool)
    same[:, -k:] = False
    if batch.seq_idx is not None:
        same &= _ahead(batch.seq_idx, k) == batch.seq_idx
    return same
