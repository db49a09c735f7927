"""What the tests of operations with a state have alike: documents, and all results of a run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BATCH = 2


def documents(length: int) -> Tensor:
    """seq_idx [BATCH, length] with documents of one and of many tokens, in each row others."""
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(BATCH, length, generator=generator) < 0.1).int().cumsum(1)


def results(
    operation: Callable[..., tuple[Tensor, Tensor]],
    names: Sequence[str],
    case: list[Tensor],
    initial_state: Tensor | None = None,
    **named: Any,
) -> dict[str, Tensor]:
    """The output, the last state and every gradient, in float64.

    Args:
        names: of the operation's inputs `case`.
    """
    inputs = [each.detach().requires_grad_() for each in case]
    if initial_state is not None:
        inputs.append(initial_state.detach().requires_grad_())
        named["initial_state"] = inputs[-1]
    y, state = operation(*inputs[: len(case)], **named)
    assert y.dtype == case[0].dtype
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (y, state)
    ]
    grads = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), inputs)
    found = {"y": y, "state": state}
    found |= dict(zip((*names, "initial_state"), grads, strict=False))
    return {name: each.detach().double() for name, each in found.items()}


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative errors in the Euclidean norm; what is not finite is wrong."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        error = float((got[name] - exact).norm() / exact.norm().clamp_min(1e-30))
        assert error < tolerance, f"{name}: {error:.1e}"
