"""Figures of a step that ranks find together, in the one reduction that the step has anyway."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.training.expert_load import ExpertLoads
from megatron_hybrid.training.extras import MoeLosses


class Meter(Protocol):
    """Each rank gives its share of some numbers; what their sums over ranks say is the figure.

    Attributes:
        name: under which a step's `readings` have it.
    """

    name: str

    def take(self, micro_batches: int, like: Tensor) -> Tensor:
        """This rank's share of the step that it has computed, `[n]` of the dtype and on the device
        of `like`; n is the same on every rank. The next step begins at nothing."""
        ...

    def read(self, sums: Sequence[float]) -> Any:
        """The figure, from `n` sums over all ranks."""
        ...


def build_meters(model: ModelConfig, chunks: Sequence[torch.nn.Module]) -> list[Meter]:
    """Those of a model, the same on every rank whatever layers it has."""
    losses, loads = MoeLosses(model), ExpertLoads(model, chunks)
    return [*([losses] if losses.names else []), *([loads] if loads.layers else [])]
