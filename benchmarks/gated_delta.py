"""The gated delta rule alone: ours against transformers' chunked one, on the CPU.

    python benchmarks/gated_delta.py --threads 1

Keys and queries of length one, and the rule; forward and with backward. Both sides take turns, and
the medians of their ratios count; the peak of memory is that of a fresh process. Sizes are those
of a layer of Qwen3-Next at half its width.
"""

import argparse
import json
from dataclasses import dataclass

import torch
from selective_scan import compare
from torch import Tensor

from megatron_hybrid.ops.gated_delta import gated_delta_rule

CHANNELS = 128  # of keys and of values


@dataclass(frozen=True)
class Case:
    """One row; its length in tokens."""

    length: int
    key_heads: int
    value_heads: int
    threads: int


def peer(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """What transformers' Qwen3NextGatedDeltaNet runs where there are no kernels."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    y, _ = torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    assert isinstance(y, Tensor)
    return y


def ours(*tensors: Tensor) -> Tensor:
    """Our kernel of the same."""
    return gated_delta_rule(*tensors)[0]


SIDES = {"transformers": peer, "ours": ours}


def inputs(case: Case) -> list[Tensor]:
    """q, k, v, g, beta, with decays as the layer draws them."""
    torch.manual_seed(0)
    tokens, keys, values = case.length, case.key_heads, case.value_heads
    rates = 1 + 15 * torch.rand(values)
    steps = torch.nn.functional.softplus(torch.randn(1, tokens, values) - 3)
    tensors = [
        torch.randn(1, tokens, keys, CHANNELS), torch.randn(1, tokens, keys, CHANNELS),
        torch.randn(1, tokens, values, CHANNELS), -rates * steps, torch.rand(1, tokens, values),
    ]  # fmt: skip
    return [each.requires_grad_() for each in tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--value-heads", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for length in args.lengths:
        case = Case(length, args.key_heads, args.value_heads, args.threads)
        print(json.dumps(compare(case, args.rounds, SIDES, inputs)), flush=True)


if __name__ == "__main__":
    main()
