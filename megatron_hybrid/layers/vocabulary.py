"""The vocabulary's two matrices and their logits: rows that stand for no word take part in nothing.

The embedding and the output layer have a multiple of `model.make_vocab_size_divisible_by` rows,
as many on each TP rank. Those beyond `model.vocab_size`, the padding, are some of the last rows, of
one rank or of several.

Legend: s sequence, b batch, v rows of this TP rank, h hidden size.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below every logit of a model, so that the exponential of its distance to one is 0. Finite, as the
# kernels of a loss subtract a rank's largest logit, which may be a padding's; far from the least
# number of fp32 and bf16, as a temperature may divide it.
PADDING_LOGIT = -1e30
# Drawn at a time: a rank draws the blocks of which it holds some row.
BLOCK_ROWS = 256


def leave_out_padding(output_layer: ColumnParallelLinear, words: int) -> None:
    """Have an output layer give its padding `PADDING_LOGIT`, which no loss on logits can notice.

    The logits are written in place; their gradient there is 0, and with it that of the padding's
    rows of the weight, whatever the loss.

    Args:
        words: `model.vocab_size`; the layer has so many rows or more, over all TP ranks.
    """
    first = output_layer.tp_group.rank() * output_layer.output_size_per_partition
    if words >= output_layer.output_size:
        return

    def hook(layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        # Gathered over TP, where that was asked for.
        whole = logits.shape[-1] == layer.output_size
        own = max(words - (0 if whole else first), 0)
        return (_Padded.apply(logits, own) if own < logits.shape[-1] else logits), bias

    output_layer.register_forward_hook(hook)


class _Padded(torch.autograd.Function):
    """Logits `[s, b, v]` with `PADDING_LOGIT` in place of those from `words` on.

    An operation of its own, on the same memory under another name: for a slice that is written to
    torch makes a second gradient of the whole, and it refuses to write to what a product returns
    where that is a view. Nothing has kept the logits as they were for its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, words: int) -> Tensor:
        ctx.words = words
        padded = logits.new_empty(0).set_(logits)  # type: ignore[call-overload]
        padded[..., words:] = PADDING_LOGIT
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if 0 in grad.stride():
            grad = grad.contiguous()  # one number in many places, as of a sum
        # In place: whoever else is given this tensor has added something to the padding's logits,
        # and its gradient there is 0 for the same reason.
        grad[..., ctx.words :] = 0.0
        return grad, None


def named_seed(text: str) -> int:
    """A seed for a generator of one's own, of 63 bits, which depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def draw_vocabulary(
    seed: int, matrix: str, words: int, std: float, *, whole: bool = False
) -> Callable[[Tensor], None]:
    """The engine's `init_method` for one of the two matrices: normal, and 0 in the padding.

    What a word's row holds depends on the seed, the matrix and the word alone, not on the padding
    or the number of TP ranks, and the generators of the other weights do not move.

    Args:
        matrix: "embedding" or "output_layer".
        words: `model.vocab_size`.
        std: standard deviation.
        whole: every TP rank has all rows.

    Returns:
        Fills a TP rank's rows, `[v, h]`; the process groups must be initialised.
    """

    @torch.no_grad()
    def draw(weight: Tensor) -> None:
        rows, width = weight.shape
        first = 0 if whole else parallel_state.get_tensor_model_parallel_rank() * rows
        end = max(first, min(first + rows, words))  # a rank's rows may all be padding
        generator = torch.Generator(weight.device)
        weight.zero_()
        for start in range(first - first % BLOCK_ROWS, end, BLOCK_ROWS):
            generator.manual_seed(named_seed(f"{seed}/{matrix}/{start}"))
            drawn = torch.empty(BLOCK_ROWS, width, device=weight.device)
            drawn.normal_(0.0, std, generator=generator)
            low, high = max(start, first), min(start + BLOCK_ROWS, end)
            weight[low - first : high - first] = drawn[low - start : high - start]

    return draw
