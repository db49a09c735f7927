"""An MLP as generation runs it.

Legend: T tokens of the step, h hidden size.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.activations import squared_relu as engine_squared_relu
from torch import Tensor

from megatron_hybrid.generation.linears import Group, Linear, Norm, sum_over
from megatron_hybrid.ops.squared_relu import squared_relu


def activation(config: Any) -> Callable[[Tensor], Tensor]:
    """What stands between the two linears of an MLP; may overwrite its input."""
    function = config.activation_func
    if config.gated_linear_unit:

        def gated(x: Tensor) -> Tensor:
            gate, linear = x.chunk(2, dim=-1)
            result: Tensor = function(gate)
            return result.mul_(linear)

        return gated
    if function in (squared_relu, engine_squared_relu):
        return lambda x: x.relu_().square_()
    chosen: Callable[[Tensor], Tensor] = function
    return chosen


class MlpLayer:
    """An MLP with the norm before it.

    Args:
        factor: on its output.
    """

    def __init__(self, layer: Any, group: Group, factor: float = 1.0) -> None:
        mlp, self._factor = layer.mlp, factor
        self.norm = Norm(mlp.linear_fc1, "layer_norm_weight", mlp.linear_fc1.eps)
        self.up, self.down = Linear(mlp.linear_fc1), Linear(mlp.linear_fc2, group=group)
        self.activation = activation(mlp.config)

    def refresh(self) -> None:
        """Take the parameters up again."""
        for each in (self.norm, self.up, self.down):
            each.refresh()

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, h]` -> `[T, h]`."""
        inner = self.activation(self.up(self.norm(x)))
        if self._factor == 1:
            return self.down.add_to(x, inner)
        output = sum_over(self.down.product(inner), self.down.group)
        if self.down.bias is not None:
            output.add_(self.down.bias)
        return x.add_(output, alpha=self._factor)
