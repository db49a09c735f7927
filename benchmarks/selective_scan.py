"""The selective scan of Mamba-1 alone: ours against transformers' sequential one, on the CPU.

    python benchmarks/selective_scan.py --threads 1

Softplus, scan, skip and gate, forward and with backward. Both sides take turns, and the medians of
their ratios count; the peak of memory is that of a fresh process. Transformers' backward takes time
that grows with the square of the length: its default width here is small, and `--rounds` few.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ssd_core import peak_resident_mib
from torch import Tensor

from megatron_hybrid.ops.selective_scan import selective_scan

Scan = Callable[..., Tensor]
Inputs = Callable[[Any], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One row; sizes in tokens, channels and states."""

    length: int
    channels: int
    state: int
    threads: int


def peer(*tensors: Tensor) -> Tensor:
    """What transformers' MambaMixer runs where there are no kernels; tensors as of `ours`."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x, dt, A, B, C, D, z, bias = tensors
    x, dt, B, C, z = (each.transpose(1, 2) for each in (x, dt, B, C, z))
    y: Tensor = mamba_selective_scan(x, dt, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
    return y.transpose(1, 2)


def ours(*tensors: Tensor) -> Tensor:
    """Our kernel of the same."""
    return selective_scan(*tensors)[0]


SIDES: dict[str, Scan] = {"transformers": peer, "ours": ours}


def inputs(case: Case) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt_bias as Mamba's initialisation has them."""
    torch.manual_seed(0)
    tokens, d, n = case.length, case.channels, case.state
    rates = torch.arange(1.0, n + 1).expand(d, n)
    tensors = [
        torch.randn(1, tokens, d), torch.randn(1, tokens, d), -rates, torch.randn(1, tokens, n),
        torch.randn(1, tokens, n), torch.ones(d), torch.randn(1, tokens, d), torch.full((d,), -4.0),
    ]  # fmt: skip
    return [each.clone().requires_grad_() for each in tensors]


def seconds(scan: Scan, tensors: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """Of the forward, and of both passes; y and the gradients."""
    start = time.perf_counter()
    y = scan(*tensors)
    forward = time.perf_counter() - start
    grads = torch.autograd.grad(y.square().sum(), tensors)
    return forward, time.perf_counter() - start, [y.detach(), *grads]


def peak_mib(case: Any, scan: Scan, inputs: Inputs) -> float:
    """What one forward and backward adds to this process's peak, in MiB."""
    torch.set_num_threads(case.threads)
    # A short case first: what the libraries allocate once is not the scan's.
    seconds(scan, inputs(replace(case, length=32)))
    tensors = inputs(case)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, _ = peak_resident_mib(), seconds(scan, tensors)
    return peak_resident_mib() - before


def compare(case: Any, rounds: int, sides: dict[str, Scan], inputs: Inputs) -> dict[str, object]:
    """Medians over rounds in which both take turns, and both peaks.

    Args:
        case: a dataclass of sizes, `length` and `threads` among them.
        sides: by name, the peer first.
        inputs: makes what they take.
    """
    torch.set_num_threads(case.threads)
    tensors = inputs(case)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for scan in sides.values():  # imports and first calls
        seconds(scan, inputs(replace(case, length=32)))
    for _ in range(rounds):
        results = {}
        for name, scan in sides.items():
            *timed, results[name] = seconds(scan, tensors)
            found[name].append((timed[0], timed[1]))
        for one, other in zip(*results.values(), strict=True):
            error = float((one - other).norm() / one.norm())
            assert error < 1e-4, f"the sides differ by {error:.1e}"
    row: dict[str, object] = asdict(case)
    for place, what in enumerate(("forward", "forward+backward")):
        both = zip(*found.values(), strict=True)
        row[f"{what} x"] = round(statistics.median(a[place] / b[place] for a, b in both), 1)
        for name, times in found.items():
            row[f"{what} {name} ms"] = round(1e3 * statistics.median(t[place] for t in times), 1)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, scan in sides.items():
            row[f"peak {name} MiB"] = round(pool.apply(peak_mib, (case, scan, inputs)), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--state", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    for length in args.lengths:
        case = Case(length, args.channels, args.state, args.threads)
        print(json.dumps(compare(case, args.rounds, SIDES, inputs)), flush=True)


if __name__ == "__main__":
    main()
