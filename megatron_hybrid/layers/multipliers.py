"""Factors on what layers compute, where a model has them; where it has none, nothing is here.

Legend: s sequence (of this rank), b batch, h hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from torch import Tensor, nn

OutputWithBias = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class ScaledSilu:
    """silu(factor * x), the activation of a gate."""

    factor: float

    def __call__(self, gate: Tensor) -> Tensor:
        """Any shape."""
        return F.silu(gate * self.factor)


def multiply_output(module: nn.Module, factor: float) -> None:
    """Have a module's output, or the first of several, multiplied with a factor."""

    def multiplied(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        return output * factor

    if factor != 1:
        module.register_forward_hook(multiplied)


def scaled_bias_dropout_add(factor: float) -> Callable[[bool, bool], Callable[..., Tensor]]:
    """The engine's `get_bias_dropout_add` of a layer's output times a factor.

    What it returns takes (output `[s, b, h]`, bias `[h]` or None), the residual and the probability
    of dropout.
    """
    if factor == 1:
        return get_bias_dropout_add

    def chosen(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)

        def scaled(output: OutputWithBias, residual: Tensor, probability: float) -> Any:
            x, bias = output
            scaled_bias = None if bias is None else bias * factor
            return add((x * factor, scaled_bias), residual, probability)

        return scaled

    return chosen
