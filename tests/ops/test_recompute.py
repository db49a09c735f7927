"""What is made again in the backward pass: the same gradients, and nothing in between kept."""

import subprocess
import sys

import torch
from torch import Tensor

from megatron_hybrid.ops.recompute import recomputed


def product(x: Tensor, scale: float, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    y = (scale * x.tanh() @ weight).masked_fill(mask, 0.0)
    return y, y.exp().sum(0)


def test_gradients_are_the_same_bits() -> None:
    """Of each tensor that asks for one; of two results, of which one may not be used."""
    torch.manual_seed(0)
    x, weight = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    mask = torch.eye(3, dtype=torch.bool)
    for used in ((0,), (1,), (0, 1)):
        results = []
        for run in (product, lambda *args: recomputed(product, *args)):
            outputs = run(x, 2.0, weight, mask)
            loss = sum(outputs[i].square().sum() for i in used)
            results.append((*outputs, *torch.autograd.grad(loss, (x, weight))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_only_arguments_are_kept() -> None:
    """Whatever the function makes in between."""
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    kept: list[int] = []
    mask = torch.zeros(4, 4, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        recomputed(product, x, 2.0, weight, mask)
    assert set(kept) == {each.data_ptr() for each in (x, weight, mask)}


def test_it_does_not_import_the_compiler() -> None:
    """Which torch's own does at its first call."""
    code = (
        "import sys, torch; from megatron_hybrid.ops.recompute import recomputed; "
        "x = torch.ones(2, requires_grad=True); recomputed(torch.exp, x).sum().backward(); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
