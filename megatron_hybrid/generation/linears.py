"""Norms and matrix products of a model's own parameters, in as few operations as they take.

Nothing is copied: the parameters are read where the modules have them, and only vectors are kept in
another precision. `refresh` looks again, as after a step of training.

Legend: t tokens (of all sequences, one after the other), k inputs, n outputs, h hidden size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.ops.bf16 import through_fp32
from megatron_hybrid.ops.gated_norm import inverse_rms
from megatron_hybrid.ops.linear import FEW_ROWS, product

# Up to here `torch.mm` is as fast as what `product` chooses, which packs the weight at each call:
# not worth it for the rows of a step.
FEW_MULTIPLICATIONS = 2**26

Group = dist.ProcessGroup | None


def sum_over(tensor: Tensor, group: Group) -> Tensor:
    """The sum of a tensor over the ranks of a group, in place; None: this rank is all."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


class Linear:
    """A product with the weight `[n, k]` of a linear, or with one that is given.

    Args:
        module: has `weight`, and `bias` or None.
        name: of the weight, where it has several.
        group: ranks whose products are to be added up, as after a split by columns.
    """

    def __init__(self, module: Any, name: str = "", group: Group = None) -> None:
        self._module, self._name, self.group = module, name, group
        self.refresh()

    def refresh(self) -> None:
        """Take the parameters up again."""
        weight: Tensor = getattr(self._module, f"weight{self._name}").detach()
        bias = getattr(self._module, f"bias{self._name}", None)
        self.bias = None if bias is None or not bias.numel() else bias.detach()
        self.weight, self.transposed = weight, weight.t()
        few = FEW_MULTIPLICATIONS // max(weight.numel(), 1)
        self.few = FEW_ROWS if through_fp32(weight) else max(few, FEW_ROWS)

    def product(self, x: Tensor) -> Tensor:
        """`[t, k]` -> `[t, n]`, without bias."""
        if x.shape[0] <= self.few:
            return torch.mm(x, self.transposed)
        return product(x, self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """`[t, k]` -> `[t, n]`."""
        output = self.product(x)
        return output if self.bias is None else output.add_(self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the product of x, summed over the ranks; residual may be overwritten."""
        if self.group is None and x.shape[0] <= self.few:
            output = torch.addmm(residual, x, self.transposed)
        else:
            output = sum_over(self.product(x), self.group).add_(residual)
        return output if self.bias is None else output.add_(self.bias)


class Norm:
    """RMSNorm with the weight `[h]` of a module.

    Args:
        name: of the weight.
    """

    def __init__(self, module: Any, name: str, eps: float) -> None:
        self._module, self._name, self._eps = module, name, eps
        self.refresh()

    def refresh(self) -> None:
        """Take the parameter up again."""
        self.weight: Tensor = getattr(self._module, self._name).detach().float()
        self.eps = self.weight.new_tensor(self._eps)

    def __call__(self, x: Tensor) -> Tensor:
        """`[t, h]` -> `[t, h]`, same dtype; computed in fp32."""
        if x.dtype == torch.float32:  # a conversion to what it is costs as much as an operation
            return torch.mul(x, inverse_rms(x, self.eps)).mul_(self.weight)
        wide = x.float()
        return torch.mul(wide, inverse_rms(wide, self.eps)).mul_(self.weight).to(x.dtype)
