"""A function of tensors whose intermediate results are made again in the backward pass.

torch.utils.checkpoint does the same, but imports torch's compiler at its first call, which costs
every rank's start more than a second.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(fn: Callable[..., Any], *arguments: Any) -> Any:
    """`fn(*arguments)`, of which only the arguments are kept for the backward pass.

    Args:
        fn: without randomness, so that it computes the same twice; returns a tensor, or a tuple of
            tensors that all have gradients.
        arguments: tensors have gradients where they ask for them; others are passed on.
    """
    if not torch.is_grad_enabled():
        return fn(*arguments)
    return _Recomputed.apply(fn, *arguments)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Callable[..., Any], *arguments: Any) -> Any:
        ctx.fn = fn
        ctx.places = [i for i, each in enumerate(arguments) if isinstance(each, Tensor)]
        ctx.others = [None if isinstance(each, Tensor) else each for each in arguments]
        ctx.save_for_backward(*(arguments[i] for i in ctx.places))
        return fn(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        arguments, asked = list(ctx.others), []
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            arguments[place] = tensor.detach()
            if ctx.needs_input_grad[place + 1]:
                arguments[place].requires_grad_()
                asked.append(place)
        with torch.enable_grad():
            made = ctx.fn(*arguments)
        outputs = made if isinstance(made, tuple) else (made,)
        found = torch.autograd.grad(
            outputs, [arguments[place] for place in asked], grads, allow_unused=True
        )
        of_places = dict(zip(asked, found, strict=True))
        return (None, *(of_places.get(place) for place in range(len(arguments))))
