"""What generation cannot do without, timed by itself: the bound of a case of `generate.py`.

Every product with a weight, by the faster of torch's kernels; every state of Mamba-2 read and
written once a token, every key and value read once. What stands between them (norms, convolution,
scan, softmax, sampling) is left out, so that no implementation with these kernels is faster.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from generate_sides import Case
from torch import Tensor

from megatron_hybrid.ops.linear import product

# Both of torch's: MKL's (or its own, for bf16), and what `product` chooses.
KERNELS: list[Callable[[Tensor, Tensor], object]] = [lambda x, w: torch.mm(x, w.t()), product]
REPEAT_S, PICK_S = 0.3, 0.03
# Of a prompt's tokens that are multiplied at once; more are no faster.
PREFILL_ROWS = 512


@dataclass(frozen=True)
class Bound:
    """The least time that a case could take, in parts.

    Attributes:
        prefill_s: of the prompts of all requests: products alone.
        decode_s: of all later tokens: products, states, keys and values.
        tokens, requests: new tokens, and of how many requests.
        parts: shares of both by what they are spent on.
    """

    prefill_s: float
    decode_s: float
    tokens: int
    requests: int
    parts: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.prefill_s + self.decode_s)

    @property
    def decode_per_s(self) -> float:
        return (self.tokens - self.requests) / self.decode_s

    @property
    def by(self) -> str:
        """Where most of the time would go, and its share: "prompts" (the products with them),
        "products" or "weights" (a token's, which wait for arithmetic or for the weights from
        memory), "states" or "KV"."""
        name = max(self.parts, key=self.parts.__getitem__)
        return f"{name} {self.parts[name]:.0%}"


@torch.no_grad()
def bound(engine: Any, case: Case) -> Bound:
    """The bound of a case, for the model and the states of an engine."""
    requests = [(len(prompt), new) for prompt, new in case.requests(engine.vocab_size)]
    prompts, tokens = (sum(each) for each in zip(*requests, strict=True))
    steps = (tokens - len(requests)) / case.batch  # with every slot taken
    layers, output = _weights(engine.decoder)
    rows = min(prompts, PREFILL_ROWS)
    prefill_s = _seconds(_products(layers, rows)) * prompts / rows

    every = [*layers, output]
    products_s, weights_s = _seconds(_products(every, case.batch)), _seconds(_reads(every))
    states = [layer.ssm for layer in engine.states.mamba]
    states_s = _seconds(lambda: [state.mul_(1.0) for state in states]) if states else 0.0
    # At the mean length of a text, over all tokens.
    places = sum(new * (2 * prompt + new) / 2 for prompt, new in requests) / tokens * case.batch
    pools = [pool for layer in engine.states.attention for pool in (layer.keys, layer.values)]
    by_token = [pool.view(-1, pool.shape[1] * pool.shape[3]) for pool in pools]
    held = [each[: round(places)].zero_() for each in by_token]
    cache_s = _seconds(_reads(held)) if held else 0.0

    # A product that takes less than twice as long as reading its weights waits for memory.
    name = "weights" if weights_s > products_s / 2 else "products"
    parts = {"prompts": prefill_s, name: products_s * steps}
    parts |= {"states": states_s * steps, "KV": cache_s * steps}
    decode_s = (products_s + states_s + cache_s) * steps
    shares = {key: value / (prefill_s + decode_s) for key, value in parts.items()}
    return Bound(prefill_s, decode_s, tokens, len(requests), shares)


def _weights(decoder: Any) -> tuple[list[Tensor], Tensor]:
    """The layers' matrices and the output's; experts as if all tokens went to the same ones."""
    layers = []
    for chunk in decoder.chunks:
        for name, weight in chunk.decoder.named_parameters():
            expert = re.search(r"local_experts\.(\d+)|weight(\d+)$", name)
            number = int(expert[1] or expert[2]) if expert else 0
            if weight.dim() == 2 and number < chunk.config.moe_router_topk:
                layers.append(weight.detach())
    return layers, decoder.output.weight


def _products(weights: list[Tensor], rows: int) -> Callable[[], object]:
    """Of so many rows with each weight, by the faster kernel for its shape."""
    chosen: dict[torch.Size, tuple[Callable[[Tensor, Tensor], object], Tensor]] = {}
    for weight in weights:
        if weight.shape not in chosen:
            x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
            times = [_seconds(partial(kernel, x, weight), PICK_S) for kernel in KERNELS]
            chosen[weight.shape] = KERNELS[times.index(min(times))], x
    work = [(*chosen[weight.shape], weight) for weight in weights]
    return lambda: [kernel(x, weight) for kernel, x, weight in work]


def _reads(tensors: list[Tensor]) -> Callable[[], object]:
    return lambda: [tensor.sum() for tensor in tensors]


def _seconds(work: Callable[[], object], least_s: float = REPEAT_S) -> float:
    """The shortest of several times; at least three, for about as long as is asked."""
    times: list[float] = []
    work()
    while len(times) < 3 or sum(times) < least_s:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
