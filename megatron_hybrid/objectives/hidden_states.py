"""Terms of distillation that bring what layers of a student leave to what a teacher's leave.

Each is computed where both layers are, as the student's layer leaves its output, and joins the
backward pass there: no hidden states travel, and the last pipeline stage need not know.

Legend: s tokens of this context parallel rank, and with sequence parallelism of this tensor
parallel rank; b samples of the micro batch, h the student's hidden size, t the teacher's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_hybrid.config import RunConfig
from megatron_hybrid.layers.vocabulary import named_seed
from megatron_hybrid.objectives.layer_pairs import LayerPair

Kind = Literal["cosine", "mse"]


def token_losses(student: Tensor, teacher: Tensor, kind: Kind) -> Tensor:
    """How far hidden states are apart, by token, in fp32.

    Args:
        student, teacher: `[s, b, t]`.
        kind: "cosine": 1 - cos of their angle, 0 to 2; "mse": the mean over t of the square of
            their difference.

    Returns:
        `[s, b]`.
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(student, teacher, dim=-1)
    return (student - teacher).square().mean(-1)


def projection(width: int, teacher_width: int, seed: int, name: str) -> nn.Linear:
    """From the student's width to the teacher's: `[t, h]`, normal with a variance of 1 / h.

    It depends on the seed and the name alone, and the run's generators do not move.
    """
    made = nn.Linear(width, teacher_width, bias=False, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(named_seed(f"{seed}/{name}"))
    with torch.no_grad():
        made.weight.normal_(0.0, width**-0.5, generator=generator)
    return made


def projections(
    config: RunConfig, teacher: RunConfig, pairs: Sequence[LayerPair], model: Any
) -> nn.ModuleDict | None:
    """Those of the pairs whose student's layers are in a chunk; None: none is needed there."""
    width, teacher_width = config.model.hidden_size, teacher.model.hidden_size
    here = {layer.layer_number for layer in model.decoder.layers}
    wanted = [pair.name for pair in pairs if pair.student in here]
    if width == teacher_width or not wanted:
        return None
    seed = config.training.seed
    made = {name: projection(width, teacher_width, seed, name) for name in wanted}
    for each in made.values():
        # Its gradient is then of a part of the tokens.
        setattr(each.weight, "sequence_parallel", config.parallel.sequence_parallel)  # noqa: B010
    return nn.ModuleDict(made)


class HiddenTerms:
    """The terms of the pairs whose layers this rank has.

    Args:
        split: whether tensor parallel ranks hold parts of the sequence.
    """

    def __init__(self, pairs: Sequence[LayerPair], kind: Kind, *, split: bool) -> None:
        self._pairs = {pair.student: pair for pair in pairs}
        self._kind, self._split = kind, split
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def compared(
        self,
        model: Any,
        mask: Tensor,
        states: Callable[[int], Tensor],
        factors: Mapping[str, float],
    ) -> Iterator[None]:
        """Within it, a forward pass of a chunk on a micro batch adds its terms to the loss.

        Args:
            model: the chunk, megatron-core's HybridModel.
            mask: `[b, s]`, of this context parallel rank.
            states: what a layer of the teacher leaves of the micro batch, `[s, b, t]`.
            factors: of terms by the names of pairs.
        """
        mask = mask.t()
        if self._split:
            size = parallel_state.get_tensor_model_parallel_world_size()
            mask = mask.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        handles = []
        for layer in model.decoder.layers:
            pair = self._pairs.get(layer.layer_number)
            if pair is not None:
                add = partial(
                    self._add, pair, states(pair.teacher), mask, factors[pair.name],
                    getattr(model, "objective", {}),
                )  # fmt: skip
                handles.append(layer.register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sums(self, device: torch.device) -> dict[str, Tensor]:
        """Since last asked, "loss": what was added to the loss, and the sum over tokens of each
        term without its weight: `[]` float64, the same on tensor parallel ranks. They ask
        together."""
        names = ["loss", *(pair.name for pair in self._pairs.values())]
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        found = torch.stack([self._sums.get(name, nothing) for name in names])
        self._sums = {}
        if self._split:
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(found, group=group)
        return dict(zip(names, found, strict=True))

    def _add(
        self,
        pair: LayerPair,
        teacher: Tensor,
        mask: Tensor,
        factor: float,
        projections: Any,
        layer: nn.Module,
        inputs: Any,
        output: Any,
    ) -> Any:
        """A forward hook of a layer: its output, with the term behind it."""
        hidden = output[0] if isinstance(output, tuple) else output
        own = projections[pair.name](hidden) if pair.name in projections else hidden
        total = (token_losses(own, teacher, self._kind) * mask).sum()
        loss = pair.weight * factor * total
        for name, value in ((pair.name, total), ("loss", loss)):
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        joined = AddedLoss.apply(hidden, loss)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined


class AddedLoss(torch.autograd.Function):
    """A tensor as it is, in whose backward pass a loss takes part: as if it were added to the
    model's own, both being sums over tokens."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.like = torch.ones_like(loss)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.like
