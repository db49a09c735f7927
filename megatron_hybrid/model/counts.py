"""How many parameters a model has and how many FLOPs a token costs, by formula, layer by layer.

Letters: d hidden_size, V padded vocabulary, L length of a sequence in tokens; Mamba-2: h heads of
p channels, i = h*p inner channels, G groups, N states, c = i + 2*G*N channels of the convolution
over K = 4 tokens; Mamba-1: i channels, all of them convolved, r rank of dt; attention: q query and
g key/value heads of k channels; gated delta net: k key heads of n channels, h value heads of p, c =
2*k*n + h*p channels of the convolution; MLP: f inner channels, u = 3 matrices (swiglu) or 2; MoE: E
experts, of which a token visits t.
"""

from dataclasses import dataclass

from megatron_hybrid.config.layers import sorts
from megatron_hybrid.config.linears import linears, recurrent, value_channels
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.pattern import ATTENTION, GDN, MAMBA, MOE, PARALLEL, made_of
from megatron_hybrid.errors import ConfigError

CONV_KERNEL = 4


@dataclass(frozen=True)
class LayerCounts:
    """Parameters of one of some layers that are alike.

    Attributes:
        kind: symbol.
        what: the kind in words.
        numbers: the layers, from 1.
        each: of one layer, its norm included.
        active: the same, counting of a MoE layer the experts a token visits.
    """

    kind: str
    what: str
    numbers: tuple[int, ...]
    each: int
    active: int


@dataclass(frozen=True)
class Counts:
    """Parameters of a model.

    Attributes:
        sorts: of the layers, by what they are alike in.
        embedding: of the embedding, its meta tokens included, and of the output layer where it has
            weights of its own.
        final_norm: of the last norm.
        prediction: of the modules of multi-token prediction.
        prediction_active: the same, counting the experts a token visits.
    """

    sorts: tuple[LayerCounts, ...]
    embedding: int
    final_norm: int
    prediction: int = 0
    prediction_active: int = 0

    @property
    def layers(self) -> dict[str, int]:
        """How many there are by symbol of a kind; kinds the model has only."""
        found: dict[str, int] = {}
        for sort in self.sorts:
            found[sort.kind] = found.get(sort.kind, 0) + len(sort.numbers)
        return found

    @property
    def per_layer(self) -> dict[str, int]:
        """Of one layer by symbol of a kind; kinds whose layers are all alike only."""
        kinds = [sort.kind for sort in self.sorts]
        return {sort.kind: sort.each for sort in self.sorts if kinds.count(sort.kind) == 1}

    @property
    def total(self) -> int:
        """All parameters."""
        layers = sum(sort.each * len(sort.numbers) for sort in self.sorts)
        return layers + self.prediction + self._ends

    @property
    def active(self) -> int:
        """Parameters that one token passes through."""
        layers = sum(sort.active * len(sort.numbers) for sort in self.sorts)
        return layers + self.prediction_active + self._ends

    @property
    def _ends(self) -> int:
        return self.embedding + self.final_norm


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of one token, forward and backward.

    Attributes:
        by_sort: symbol of the kind and all layers of a sort together, in the order of `sorts`.
        logits: the output layer.
        prediction: the modules of multi-token prediction, with the output layer of each.
    """

    by_sort: tuple[tuple[str, float], ...]
    logits: float
    prediction: float = 0.0

    @property
    def by_kind(self) -> dict[str, float]:
        """Symbol -> all layers of that kind together."""
        found: dict[str, float] = {}
        for kind, flops in self.by_sort:
            found[kind] = found.get(kind, 0.0) + flops
        return found

    @property
    def total(self) -> float:
        """All of them."""
        return sum(flops for _, flops in self.by_sort) + self.logits + self.prediction


def _vocabulary(model: ModelConfig) -> int:
    if model.padded_vocab_size is None:
        raise ConfigError(
            [
                "model.vocab_size is not set, and without a tokenizer it is not known; "
                "it must be a whole number of at least 1"
            ]
        )
    return model.padded_vocab_size


def _steps_products(model: ModelConfig) -> int:
    """2r + 2N: what a channel of Mamba-1 has in x_proj and dt_proj."""
    assert model.mamba_dt_rank is not None
    return 2 * (model.mamba_dt_rank + model.mamba_state_dim)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on a rank.

    Attributes:
        dense: in the run's format, and of every layer but of experts.
        fp32: always in fp32: A_log, D and dt_bias of Mamba and gated delta nets.
        expert: of experts.
    """

    dense: int = 0
    fp32: int = 0
    expert: int = 0

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(
            self.dense + other.dense, self.fp32 + other.fp32, self.expert + other.expert
        )

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.fp32 + self.expert


def layer_parameters(
    model: ModelConfig, kind: str, *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Of one layer with its norm, whole or on a tensor- and expert-parallel rank.

    `model` has the layer's own sizes, as that of `config.layers.Layer` has.

    Linears, with biases but in Mamba and gated delta nets; Mamba-2: convolution c(K+1), gated norm
    i (where there is one), and 3h in fp32; Mamba-1: convolution i(K+1), x_proj i(r+2N), dt_proj ir,
    where they are normed r+2N, and i(N+2) in fp32; gated delta net: convolution cK, a norm p, and
    2h in fp32; MoE: the router's d*E, with biases E more. Parallel heads: both, with one norm
    before them; where they share their linears, 2i for the norms after both.
    """
    if kind == PARALLEL and model.parallel_heads_join == "mean":
        shared = linears(model, kind, tp=tp).values()
        weights = sum(each.inputs * each.outputs for each in shared)
        norms = model.hidden_size + 2 * recurrent(model, MAMBA).convolved // tp
        return _beside_linears(model, tp) + Parameters(dense=weights + norms)
    if kind == PARALLEL:
        parts = [layer_parameters(model, part, tp=tp) for part in made_of(kind)]
        shared_norms = (len(parts) - 1) * model.hidden_size
        return sum(parts, Parameters(dense=-shared_norms))
    dense, of_expert = model.hidden_size, 0
    for linear in linears(model, kind, tp=tp, etp=etp).values():
        weights = linear.inputs * linear.outputs
        if model.add_bias_linear and kind not in (MAMBA, GDN):
            weights += linear.outputs
        dense, of_expert = (
            (dense, of_expert + weights) if linear.routed else (dense + weights, of_expert)
        )
    experts = 0
    if kind == MOE:
        assert model.num_moe_experts is not None
        dense += model.num_moe_experts * (model.hidden_size + model.add_bias_linear)
        experts = model.num_moe_experts // ep
    found = Parameters(dense, expert=experts * of_expert)
    if kind == GDN:
        return found + _beside_gdn_linears(model, tp)
    return found + _beside_linears(model, tp) if kind == MAMBA else found


def _beside_linears(model: ModelConfig, tp: int) -> Parameters:
    """Of a Mamba mixer."""
    if model.mamba_version == 1:
        assert model.mamba_dt_rank is not None
        inner = recurrent(model, MAMBA).convolved // tp
        normed = model.mamba_dt_rank + 2 * model.mamba_state_dim
        norms = normed if model.mamba_inner_layernorms else 0
        return Parameters(
            inner * (CONV_KERNEL + 1 + _steps_products(model)) + norms,
            inner * (model.mamba_state_dim + 2),
        )
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    gated_norm = inner if model.mamba_rms_norm else 0
    dense = (recurrent(model, MAMBA).convolved * (CONV_KERNEL + 1) + gated_norm) // tp
    return Parameters(dense, 3 * model.mamba_num_heads // tp)


def _beside_gdn_linears(model: ModelConfig, tp: int) -> Parameters:
    """Of a gated delta net."""
    assert model.linear_num_value_heads is not None
    convolution = recurrent(model, GDN).convolved * CONV_KERNEL // tp
    fp32 = 2 * model.linear_num_value_heads // tp
    return Parameters(convolution + model.linear_value_head_dim, fp32)


def _active(model: ModelConfig, kind: str) -> int:
    """Parameters of a layer that one token passes through."""
    whole = layer_parameters(model, kind)
    visited = whole.expert * model.moe_router_topk // (model.num_moe_experts or 1)
    return whole.dense + whole.fp32 + visited


def count_parameters(model: ModelConfig) -> Counts:
    """Count the parameters of a resolved model, as it is built: with its vocabulary padded.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """
    d, matrices = model.hidden_size, 2 if model.untie_embeddings_and_output_weights else 1
    return Counts(
        sorts=tuple(
            LayerCounts(
                sort.kind, sort.layer.what, sort.numbers,
                layer_parameters(sort.model, sort.kind).total, _active(sort.model, sort.kind),
            )
            for sort in sorts(model)
        ),
        embedding=(matrices * _vocabulary(model) + model.num_meta_tokens) * d,
        final_norm=d,
        prediction=prediction_parameters(model).total,
        prediction_active=_prediction_active(model),
    )  # fmt: skip


def prediction_parameters(
    model: ModelConfig, *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Of all modules of multi-token prediction, whole or on a rank."""
    d, found = model.hidden_size, Parameters()
    for _ in range(model.mtp_num_layers or 0):
        found += Parameters(dense=3 * d + 2 * d * d // tp)
        for kind in model.mtp_hybrid_override_pattern or "":
            found += layer_parameters(model, kind, tp=tp, ep=ep, etp=etp)
    return found


def _prediction_active(model: ModelConfig) -> int:
    """Of those, parameters that one token passes through."""
    d, layers = model.hidden_size, model.mtp_hybrid_override_pattern or ""
    of_module = 3 * d + 2 * d * d + sum(_active(model, kind) for kind in layers)
    return (model.mtp_num_layers or 0) * of_module


def mean_keys(model: ModelConfig, seq_length: int) -> float:
    """Keys that a query sees on average: (L+1)/2, or fewer within a window of w to the left.

    Query j (from 0) sees min(j, w) + 1 keys; all L where attention has no mask. Of m meta tokens,
    which are some of the L, it also sees the min(m, j - w) that are before its window.
    """
    if model.attn_mask_type == "no_mask":
        return seq_length
    left = seq_length - 1
    if model.window_size is not None:
        left = min(left, model.window_size[0])
    full = seq_length - left  # queries with a whole window behind them
    metas = min(model.num_meta_tokens, full - 1)
    seen_beside = metas * (metas - 1) / 2 + metas * (full - metas)
    return (left * (left + 1) / 2 + full * (left + 1) + seen_beside) / seq_length


def _forward_flops(model: ModelConfig, kind: str, seq_length: int) -> float:
    """FLOPs of one token through one layer, a multiplication and an addition counting as two."""
    if kind == PARALLEL and model.parallel_heads_join == "sum":
        return sum(_forward_flops(model, part, seq_length) for part in made_of(kind))
    products = sum(
        2 * linear.inputs * linear.outputs * (model.moe_router_topk if linear.routed else 1)
        for linear in linears(model, kind).values()
    )
    if kind == PARALLEL:
        return products + _scan_flops(model) + _attention_flops(model, kind, seq_length)
    if kind == MAMBA:
        return products + _scan_flops(model)
    if kind == GDN:
        # The recurrence per number of the state: decay, what it says of k, change, readout.
        state, convolved = recurrent(model, kind)
        return products + 2 * CONV_KERNEL * convolved + 7 * state
    if kind == ATTENTION:
        return products + _attention_flops(model, kind, seq_length)
    if kind == MOE:
        assert model.num_moe_experts is not None
        return products + 2 * model.hidden_size * model.num_moe_experts
    return products


def _scan_flops(model: ModelConfig) -> float:
    """Of a Mamba mixer, but for its linears.

    The recurrence per channel and state: decay, input and sum (3), readout (2).
    """
    state, convolved = recurrent(model, MAMBA)
    products = _steps_products(model) if model.mamba_version == 1 else 0
    return 2 * convolved * (CONV_KERNEL + products) + 5 * state


def _attention_flops(model: ModelConfig, kind: str, seq_length: int) -> float:
    """Of the products with keys, and with values."""
    assert model.num_attention_heads is not None and model.kv_channels is not None
    channels = model.kv_channels + value_channels(model, kind)
    return 2 * model.num_attention_heads * channels * mean_keys(model, seq_length)


def flops_per_token(model: ModelConfig, seq_length: int) -> Flops:
    """Model FLOPs to train on one token of a sequence of `seq_length` tokens.

    The backward pass counts twice the forward pass. Counted are matrix products, the convolution
    and the SSM recurrence; norms, activations and what recomputation repeats are not. Attention
    counts the keys that a query sees; packed documents are taken for one. What meta tokens cost is
    shared out among the tokens of a sequence.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """
    length = seq_length + model.num_meta_tokens
    factor = 3.0 * length / seq_length
    by_sort = tuple(
        (sort.kind, factor * len(sort.numbers) * _forward_flops(sort.model, sort.kind, length))
        for sort in sorts(model)
    )
    logits, d = factor * 2 * model.hidden_size * _vocabulary(model), model.hidden_size
    layers = sum(
        _forward_flops(model, kind, seq_length) for kind in model.mtp_hybrid_override_pattern or ""
    )
    of_module = 3.0 * (2 * 2 * d * d + layers) + logits
    return Flops(by_sort, logits, (model.mtp_num_layers or 0) * of_module)
