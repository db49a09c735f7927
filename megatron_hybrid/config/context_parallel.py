"""Bytes that a context-parallel rank sends for a layer with a state, by how the ranks share it.

Torch-free; of a forward pass of one layer, and as many backward.
"""

from typing import NamedTuple

from megatron_hybrid.config.linears import gdn_widths, linears
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import GDN

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
    if kind == GDN:
        keys, convolved = gdn_widths(model)
        state, convolved = convolved * model.linear_key_head_dim, 2 * keys + convolved
    elif model.mamba_version == 1:
        assert model.mamba_intermediate_size is not None
        convolved = model.mamba_intermediate_size
        state = convolved * model.mamba_state_dim
    else:
        assert model.mamba_num_heads is not None
        inner = model.mamba_num_heads * model.mamba_head_dim
        state = inner * model.mamba_state_dim
        convolved = inner + 2 * model.mamba_num_groups * model.mamba_state_dim
    return Passed(
        STATE_BYTES * samples * state / tp,
        number_bytes * samples * CONVOLVED_BEFORE * convolved / tp,
    )
