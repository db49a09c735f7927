"""How evenly the tokens of a step fell on the experts, layer by layer.

Legend: l MoE layers of the model, E experts, of the layer that has most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import layers
from megatron_hybrid.config.pattern import MOE
from megatron_hybrid.layers.router import TopKRouter


@dataclass(frozen=True)
class ExpertLoad:
    """Where the tokens of a step went, over all ranks.

    Attributes:
        layers: numbers of the MoE layers in the pattern, from 1.
        tokens: `[l, E]` int64: tokens that each expert took.
        asked: `[l]` int64: pairs of a token and an expert before any were dropped.
        experts: `[l]`: how many a layer has; None: E.
    """

    layers: tuple[int, ...]
    tokens: np.ndarray
    asked: np.ndarray
    experts: tuple[int, ...] | None = None

    @property
    def _counts(self) -> np.ndarray:
        """`[l]` int64: experts."""
        every = self.experts or (self.tokens.shape[1],) * len(self.tokens)
        return np.asarray(every, dtype=np.int64)

    @property
    def shares(self) -> np.ndarray:
        """`[l, E]`: each expert's share of the tokens that were taken; rows sum to 1."""
        return self.tokens / np.maximum(self.tokens.sum(axis=1, keepdims=True), 1)

    @property
    def rows(self) -> list[list[float]]:
        """`shares`, of each layer those of the experts that it has."""
        every = zip(self.shares.tolist(), self._counts.tolist(), strict=True)
        return [row[:experts] for row, experts in every]

    @property
    def max_over_mean(self) -> np.ndarray:
        """`[l]`: tokens of the busiest expert over those of the average one; 1 is even."""
        return self.shares.max(axis=1) * self._counts

    @property
    def dropped(self) -> np.ndarray:
        """`[l]`: share of the pairs that were dropped, experts being full."""
        return 1.0 - self.tokens.sum(axis=1) / np.maximum(self.asked, 1)

    @property
    def dead(self) -> np.ndarray:
        """`[l]` int: experts that took no token."""
        return self._counts - (self.tokens > 0).sum(axis=1)

    def summary(self) -> dict[str, list[Any]]:
        """What is recorded of each step: a number a layer."""
        return {
            "layers": list(self.layers),
            "max_over_mean": self.max_over_mean.tolist(),
            "dropped": self.dropped.tolist(),
            "dead": self.dead.tolist(),
        }

    def line(self) -> str:
        """The worst of the layers, for the console."""
        worst = int(np.argmax(self.max_over_mean))
        parts = [
            f"expert load {self.max_over_mean[worst]:.2f} x mean in layer {self.layers[worst]}"
        ]
        if self.dead.any():
            parts.append(f"{self.dead.sum()} dead")
        if self.dropped.max() > 0:
            parts.append(f"{self.dropped.max():.1%} dropped")
        return ", ".join(parts)


class ExpertLoads:
    """A meter: the counts that this rank's routers leave behind in each step.

    Args:
        chunks: this rank's pipeline chunks.
    """

    name = "expert_load"

    def __init__(self, model: ModelConfig, chunks: Sequence[torch.nn.Module]) -> None:
        moe = [layer for layer in layers(model) if layer.kind == MOE]
        self.layers = tuple(layer.number for layer in moe)
        self._experts = tuple(layer.model.num_moe_experts or 0 for layer in moe)
        modules = [module for chunk in chunks for module in chunk.modules()]
        # Of multi-token prediction, whose layers have numbers of their own.
        ahead = {
            part
            for block in modules
            if isinstance(block, MultiTokenPredictionBlock)
            for part in block.modules()
        }
        self._routers = [
            module for module in modules if isinstance(module, TopKRouter) and module not in ahead
        ]

    def take(self, micro_batches: int, like: Tensor) -> Tensor:
        """This rank's counts of the step, to be added up over ranks: `[l * (E + 1)]` as `like`.

        Each token is routed on one rank of its pipeline stage, so that the sum counts it once.
        """
        counts = like.new_zeros(len(self.layers), max(self._experts, default=0) + 1)
        for router in self._routers:
            load = router.take_load()
            if load is None:
                continue
            row = counts[self.layers.index(router.layer_number)]
            if len(load) == len(row):
                row += load
            else:
                row[: len(load) - 1] += load[:-1]
                row[-1] += load[-1]
        return counts.flatten()

    def read(self, counts: Sequence[float]) -> ExpertLoad:
        """What the sums over ranks say."""
        table = np.asarray(counts, dtype=np.int64).reshape(len(self.layers), -1)
        return ExpertLoad(self.layers, table[:, :-1], table[:, -1], self._experts)
