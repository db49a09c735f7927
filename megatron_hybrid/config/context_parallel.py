"""Bytes that a context-parallel rank sends for a layer with a state, by how the ranks share it.

Torch-free; of a forward pass of one layer, and as many backward.
"""

from typing import NamedTuple

from megatron_hybrid.config.linears import linears, recurrent
from megatron_hybrid.config.model import ModelConfig

CONVOLVED_BEFORE = 3  # tokens before one that a mixer's convolution reaches
STATE_BYTES = 4  # of a number in a state


class Passed(NamedTuple):
    """Bytes of what one chunk leaves to the next; a rank has two chunks.

    Attributes:
        state: of the scan.
        end: the last inputs of the convolution.
    """

    state: float
    end: float

    def sent(self, cp: int) -> float:
        """By the rank of `cp` that sends most: of two the next chunk of one is its own."""
        return min(2, cp - 1) * (self.state + self.end)


def exchanged_bytes(
    model: ModelConfig, kind: str, *, tp: int, cp: int, tokens: float, number_bytes: int
) -> float:
    """By an all-to-all from sequence to heads, and back.

    Args:
        model: with the layer's own sizes.
        kind: "M" or "G".
        tokens: of a micro batch on a rank.
        number_bytes: of a number in the activations.
    """
    mixer = linears(model, kind, tp=tp)
    width = mixer["in_proj"].outputs + mixer["out_proj"].inputs
    return number_bytes * tokens * width * (cp - 1) / cp


def passed_bytes(
    model: ModelConfig, kind: str, *, tp: int, samples: int, number_bytes: int
) -> Passed:
    """By state passing, for `samples` in a micro batch; other arguments as of `exchanged_bytes`."""
    state, convolved = recurrent(model, kind)
    return Passed(
        STATE_BYTES * samples * state / tp,
        number_bytes * samples * CONVOLVED_BEFORE * convolved / tp,
    )
