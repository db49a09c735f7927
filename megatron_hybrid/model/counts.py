"""How many parameters a model has and how many FLOPs a token costs, by formula, layer by layer.

Letters: d hidden_size, V padded vocabulary, L length of a sequence in tokens; Mamba-2: h heads of
p channels, i = h*p inner channels, G groups, N states, c = i + 2*G*N channels of the convolution
over K = 4 tokens; attention: q query and g key/value heads of k channels; MLP: f inner channels,
u = 3 matrices (swiglu) or 2; MoE: E experts, of which a token visits t.
"""

from dataclasses import dataclass
from types import MappingProxyType

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, KINDS, MAMBA, MLP, MOE, parse_pattern
from megatron_hybrid.errors import ConfigError

CONV_KERNEL = 4


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        layers: symbol of a kind -> how many layers of it; kinds the model has only.
        per_layer: symbol -> parameters of one such layer, its norm included.
        active_per_layer: the same, counting of a MoE layer the experts a token visits.
        embedding: of the embedding, and of the output layer where it has weights of its own.
        final_norm: of the last norm.
    """

    layers: MappingProxyType[str, int]
    per_layer: MappingProxyType[str, int]
    active_per_layer: MappingProxyType[str, int]
    embedding: int
    final_norm: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self._sum(self.per_layer)

    @property
    def active(self) -> int:
        """Parameters that one token passes through."""
        return self._sum(self.active_per_layer)

    def _sum(self, per_layer: MappingProxyType[str, int]) -> int:
        blocks = sum(per_layer[kind] * count for kind, count in self.layers.items())
        return blocks + self.embedding + self.final_norm


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one token, forward and backward.

    Attributes:
        by_kind: symbol -> all layers of that kind together.
        logits: the output layer.
    """

    by_kind: MappingProxyType[str, float]
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.by_kind.values()) + self.logits


def _vocabulary(model: ModelConfig) -> int:
    if model.padded_vocab_size is None:
        raise ConfigError(
            [
                "model.vocab_size is not set, and without a tokenizer it is not known; "
                "it must be a whole number of at least 1"
            ]
        )
    return model.padded_vocab_size


def _mamba_widths(model: ModelConfig) -> tuple[int, int, int]:
    """i, the width of in_proj's output (z, x, B, C, dt), and c (x, B, C)."""
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    states = model.mamba_num_groups * model.mamba_state_dim
    return inner, 2 * inner + 2 * states + model.mamba_num_heads, inner + 2 * states


def _mamba_parameters(model: ModelConfig) -> int:
    """d(2i+2GN+h) + c(K+1) + 3h + i + i*d + d: in_proj, conv, (A_log, D, dt_bias), norms, out."""
    d, heads = model.hidden_size, model.mamba_num_heads
    assert heads is not None
    inner, in_width, conv = _mamba_widths(model)
    return d * in_width + conv * (CONV_KERNEL + 1) + 3 * heads + inner + inner * d + d


def _attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels of all queries q*k, and of all keys and values 2*g*k."""
    heads, groups, channels = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert heads is not None and groups is not None and channels is not None
    return heads * channels, 2 * groups * channels


def _attention_parameters(model: ModelConfig) -> int:
    """d*q*k + 2*d*g*k + q*k*d + d: queries, keys and values, output, norm."""
    queries, keys_values = _attention_widths(model)
    biases = queries + keys_values + model.hidden_size if model.add_bias_linear else 0
    return model.hidden_size * (2 * queries + keys_values) + biases + model.hidden_size


def _matrices(model: ModelConfig) -> int:
    return 3 if model.activation == "swiglu" else 2


def _mlp_weights(model: ModelConfig, inner: int) -> int:
    """u*d*f, and biases of (u-1)*f + d where there are some."""
    matrices = _matrices(model)
    biases = (matrices - 1) * inner + model.hidden_size if model.add_bias_linear else 0
    return matrices * model.hidden_size * inner + biases


def _moe_parameters(model: ModelConfig, experts: int) -> int:
    """E*d router weights, `experts` experts, the shared expert, and the norm."""
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    router = model.num_moe_experts * model.hidden_size
    shared_width = model.moe_shared_expert_intermediate_size
    shared = _mlp_weights(model, shared_width) if shared_width is not None else 0
    routed = experts * _mlp_weights(model, model.moe_ffn_hidden_size)
    return router + routed + shared + model.hidden_size


def _layer_parameters(model: ModelConfig, kind: str, *, active: bool) -> int:
    if kind == MAMBA:
        return _mamba_parameters(model)
    if kind == ATTENTION:
        return _attention_parameters(model)
    if kind == MLP:
        assert model.ffn_hidden_size is not None
        return _mlp_weights(model, model.ffn_hidden_size) + model.hidden_size
    assert kind == MOE and model.num_moe_experts is not None
    return _moe_parameters(model, model.moe_router_topk if active else model.num_moe_experts)


def count_parameters(model: ModelConfig) -> Counts:
    """Count the parameters of a resolved model, as it is built: with its vocabulary padded.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """
    pattern, d = parse_pattern(model.hybrid_layer_pattern), model.hidden_size
    kinds = [kind for kind in KINDS if pattern.has(kind)]
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return Counts(
        layers=MappingProxyType({kind: pattern.count(kind) for kind in kinds}),
        per_layer=MappingProxyType({k: _layer_parameters(model, k, active=False) for k in kinds}),
        active_per_layer=MappingProxyType(
            {k: _layer_parameters(model, k, active=True) for k in kinds}
        ),
        embedding=matrices * _vocabulary(model) * d,
        final_norm=d,
    )


def mean_keys(model: ModelConfig, seq_length: int) -> float:
    """Keys that a query sees on average: (L+1)/2, or fewer within a window of w to the left.

    Query j (from 0) sees min(j, w) + 1 keys.
    """
    left = seq_length - 1
    if model.window_size is not None:
        left = min(left, model.window_size[0])
    full = seq_length - left  # queries with a whole window behind them
    return (left * (left + 1) / 2 + full * (left + 1)) / seq_length


def _forward_flops(model: ModelConfig, kind: str, seq_length: int) -> float:
    """FLOPs of one token through one layer, a multiplication and an addition counting as two."""
    d = model.hidden_size
    if kind == MAMBA:
        inner, in_width, conv = _mamba_widths(model)
        # The recurrence per channel and state: decay, input and sum (3), readout (2).
        scan = 5 * inner * model.mamba_state_dim
        return 2 * d * in_width + 2 * CONV_KERNEL * conv + scan + 2 * inner * d
    if kind == ATTENTION:
        queries, keys_values = _attention_widths(model)
        scores_and_values = 4 * queries * mean_keys(model, seq_length)
        return 2 * d * (2 * queries + keys_values) + scores_and_values
    if kind == MLP:
        assert model.ffn_hidden_size is not None
        return 2 * _matrices(model) * d * model.ffn_hidden_size
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    shared = model.moe_shared_expert_intermediate_size or 0
    widths = model.moe_router_topk * model.moe_ffn_hidden_size + shared
    return 2 * d * model.num_moe_experts + 2 * _matrices(model) * d * widths


def flops_per_token(model: ModelConfig, seq_length: int) -> Flops:
    """Model FLOPs to train on one token of a sequence of `seq_length` tokens.

    The backward pass counts twice the forward pass. Counted are matrix products, the convolution
    and the SSM recurrence; norms, activations and what recomputation repeats are not. Attention
    counts the keys that a causal query sees; packed documents are taken for one.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """
    pattern = parse_pattern(model.hybrid_layer_pattern)
    by_kind = {
        kind: 3.0 * pattern.count(kind) * _forward_flops(model, kind, seq_length)
        for kind in KINDS
        if pattern.has(kind)
    }
    return Flops(MappingProxyType(by_kind), 3.0 * 2 * model.hidden_size * _vocabulary(model))
