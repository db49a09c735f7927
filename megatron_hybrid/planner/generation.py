"""Memory to generate text on one GPU: weights, keys and values, and the states of Mamba and gated
delta nets."""

from dataclasses import dataclass

from megatron_hybrid.config.layers import layers_of, sorts
from megatron_hybrid.config.linears import recurrent, value_channels
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, PARALLEL
from megatron_hybrid.model.counts import CONV_KERNEL, count_parameters


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes.

    Attributes:
        weights: of all parameters.
        keys_values: of all sequences, up to the context's length.
        ssm_states, conv_states: of all sequences, whatever their length.
    """

    weights: int
    keys_values: int
    ssm_states: int
    conv_states: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.keys_values + self.ssm_states + self.conv_states


def generation_memory(
    model: ModelConfig,
    context_tokens: int,
    batch_size: int = 1,
    *,
    number_bytes: int = 2,
    state_bytes: int = 4,
    by_window: bool = False,
) -> GenerationMemory:
    """What generation holds when `batch_size` sequences have `context_tokens` tokens each.

    Keys and values are kept as `megatron-hybrid generate` keeps them: of tokens that some layer
    still sees, by every layer; those of meta tokens as often as there are sequences.

    Args:
        number_bytes: of a weight, a key or a value.
        state_bytes: of a number of a state: 4, as states are fp32 whatever the weights are. Other
            programs keep 2.
        by_window: keep of each layer what it sees itself, as other programs do.
    """
    keys_values = ssm = conv = 0
    windows = [layer.model.window_size for layer in layers_of(model, ATTENTION)]
    seen = [context_tokens if window is None else window[0] + 1 for window in windows]
    length = min(context_tokens, max(seen, default=0)) + model.num_meta_tokens
    for sort in sorts(model):
        m, layers = sort.model, batch_size * len(sort.numbers)
        if by_window and sort.has(ATTENTION):
            own = m.window_size
            length = context_tokens if own is None else min(context_tokens, own[0] + 1)
            length += m.num_meta_tokens
        if sort.has(ATTENTION) and not (sort.kind == PARALLEL and m.reuse_kv):
            assert m.num_query_groups is not None and m.kv_channels is not None
            channels = m.kv_channels + value_channels(m, sort.kind)
            keys_values += layers * length * m.num_query_groups * channels * number_bytes
        for kind in filter(sort.has, (MAMBA, GDN)):
            state, convolved = recurrent(m, kind)
            ssm += layers * state * state_bytes
            conv += layers * convolved * (CONV_KERNEL - 1) * state_bytes
    weights = count_parameters(model).total * number_bytes
    return GenerationMemory(weights, keys_values, ssm, conv)
