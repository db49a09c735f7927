"""The `model` section: what the network is, whatever it runs on."""

from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_serializer

from megatron_hybrid.bounds import text_problem
from megatron_hybrid.config.base import (
    Count,
    Far,
    FrozenDict,
    Positive,
    PositiveReal,
    Real,
    RotaryBase,
    Section,
    Text,
    Whole,
    Words,
)

# Room for ten times the layers of any model.
LayerPattern = Annotated[str, Far(partial(text_problem, most=10_000))]
Window = Annotated[tuple[Whole, Whole], Strict(False), Words("two whole numbers such as [128, 0]")]
SsmMultipliers = Annotated[
    tuple[PositiveReal, PositiveReal, PositiveReal, PositiveReal, PositiveReal],
    Strict(False),
    Words("five numbers above 0 such as [1.0, 1.0, 1.0, 1.0, 1.0]"),
]
MlpMultipliers = Annotated[
    tuple[PositiveReal, PositiveReal],
    Strict(False),
    Words("two numbers above 0 such as [1.0, 1.0]"),
]
Activation = Literal["squared_relu", "swiglu", "gelu"]
Positions = Literal["none", "rope"]
ParallelHeadsJoin = Literal["sum", "mean"]
MambaVersion = Annotated[int, Field(ge=1, le=2)]


class Unsaid(Enum):
    """What an entry of `model.layers` leaves to the model: null means something of its own."""

    UNSAID = "the model's"

    def __str__(self) -> str:
        return self.value


UNSAID = Unsaid.UNSAID


def _unsaid(description: str) -> Any:
    return Field(default=UNSAID, description=description)


class LayerConfig(Section):
    """Sizes of a layer (3), a range (10-20) or a kind (M), in place of the model's. A number wins
    over a range, a range over a kind; what none of them says is the model's."""

    ffn_hidden_size: Positive = _unsaid("MLP: inner width")
    activation: Activation = _unsaid("MLP, MoE: activation")
    num_attention_heads: Positive = _unsaid("attention: query heads")
    num_query_groups: Positive = _unsaid("attention: key and value heads")
    kv_channels: Positive = _unsaid("attention: channels of a head")
    window_size: Window | None = _unsaid("attention: [tokens seen to the left, 0]; null: all")
    position_embedding_type: Positions = _unsaid("attention: positions")
    reuse_kv: bool = _unsaid("parallel heads: keys and values of the nearest such layer before")
    mamba_version: MambaVersion = _unsaid("Mamba: 1 or 2")
    mamba_num_heads: Positive = _unsaid("Mamba-2: heads")
    mamba_head_dim: Positive = _unsaid("Mamba-2: channels of a head")
    mamba_state_dim: Positive = _unsaid("Mamba: SSM states of a channel")
    mamba_num_groups: Positive = _unsaid("Mamba-2: groups of heads that share B and C")
    mamba_intermediate_size: Positive = _unsaid("Mamba-1: channels")
    mamba_dt_rank: Positive = _unsaid("Mamba-1: rank of the steps' projection")
    linear_num_key_heads: Positive = _unsaid("gated delta net: query and key heads")
    linear_num_value_heads: Positive = _unsaid("gated delta net: value heads")
    linear_key_head_dim: Positive = _unsaid("gated delta net: channels of a query and a key")
    linear_value_head_dim: Positive = _unsaid("gated delta net: channels of a value")
    num_moe_experts: Positive = _unsaid("MoE: experts")
    moe_ffn_hidden_size: Positive = _unsaid("MoE: inner width of one expert")
    moe_router_topk: Positive = _unsaid("MoE: experts a token goes to")
    moe_shared_expert_intermediate_size: Positive | None = _unsaid(
        "MoE: inner width of the expert that every token goes to; null: none"
    )
    moe_latent_size: Positive | None = _unsaid(
        "MoE: width that tokens are projected to for the experts; null: hidden_size, as they are"
    )
    moe_router_num_groups: Positive | None = _unsaid(
        "MoE: groups of experts, of which a token goes to some; null: no groups"
    )
    moe_router_group_topk: Positive | None = _unsaid("MoE: groups that a token goes to")

    @model_serializer
    def said(self) -> dict[str, Any]:
        """What it says, by field."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not UNSAID}


def _null_is_nothing(value: Any) -> Any:
    return {} if value is None else value


Layers = Annotated[
    dict[Text, LayerConfig],
    BeforeValidator(_null_is_nothing),
    AfterValidator(FrozenDict),
    Words("sizes by kind, range or number such as {M: {mamba_num_heads: 8}, 10-20: {...}}"),
]


class ModelConfig(Section):
    """Sizes and layer kinds; null sizes are derived where they apply."""

    hybrid_layer_pattern: LayerPattern = Field(
        description="one symbol a layer: M Mamba, * attention, - MLP, E MoE, H attention and "
        "Mamba side by side, G gated delta net; '|' ends a pipeline segment"
    )
    hidden_size: Positive = Field(description="width of the residual stream")
    ffn_hidden_size: Positive | None = Field(
        default=None, description="inner width of an MLP layer; null: 4 * hidden_size"
    )
    activation: Activation = Field(
        default="squared_relu", description="activation of MLP layers and experts"
    )
    num_attention_heads: Positive | None = Field(
        default=None, description="query heads; needed with '*' or 'H' in the pattern"
    )
    num_query_groups: Positive | None = Field(
        default=None, description="key and value heads; null: num_attention_heads"
    )
    kv_channels: Positive | None = Field(
        default=None,
        description="channels of one attention head; null: hidden_size / num_attention_heads",
    )
    window_size: Window | None = Field(
        default=None, description="sliding attention: [tokens seen to the left, 0]; null: all"
    )
    attn_mask_type: Literal["causal", "no_mask"] = Field(
        default="causal",
        description="what a token of an attention layer sees: those up to its own, or all",
    )
    position_embedding_type: Positions = Field(
        default="none", description="positions in attention layers"
    )
    # A number like any other, of models that read millions of tokens above 2**31.
    rotary_base: RotaryBase = Field(default=10000, description="base of the rotary frequencies")
    rotary_percent: float = Field(
        default=1.0, gt=0, le=1, description="fraction of a head's channels that rotate"
    )
    reuse_kv: bool = Field(
        default=False,
        description="parallel heads: attend to keys and values of the nearest such layer before "
        "that has some, and have none",
    )
    key_multiplier: PositiveReal = Field(default=1.0, description="attention: factor on the keys")
    mamba_version: MambaVersion = Field(
        default=2,
        description="what M layers are, and H layers have: Mamba-1's selective scan, or "
        "Mamba-2's SSD",
    )
    mamba_num_heads: Positive | None = Field(
        default=None, description="Mamba-2 heads; null: 2 * hidden_size / mamba_head_dim"
    )
    mamba_head_dim: Positive = Field(default=64, description="channels of one Mamba-2 head")
    mamba_state_dim: Positive = Field(
        default=128, description="SSM states of a channel; usual for Mamba-1: 16"
    )
    mamba_num_groups: Positive = Field(
        default=8, description="Mamba-2: groups of heads that share B and C"
    )
    mamba_intermediate_size: Positive | None = Field(
        default=None, description="channels of Mamba-1; null: 2 * hidden_size"
    )
    mamba_dt_rank: Positive | None = Field(
        default=None,
        description="Mamba-1: rank of the projection to a step size for each channel; null: "
        "hidden_size / 16, rounded up",
    )
    mamba_inner_layernorms: bool = Field(
        default=False,
        description="Mamba-1: norms of what its step sizes are made of, of B and of C",
    )
    mamba_rms_norm: bool = Field(
        default=True, description="Mamba-2: a norm of each group of channels after the gate"
    )
    ssm_multipliers: SsmMultipliers = Field(
        default=(1.0, 1.0, 1.0, 1.0, 1.0),
        description="Mamba-2: factors on the projected z, x, B, C and dt",
    )
    parallel_heads_join: ParallelHeadsJoin = Field(
        default="sum",
        description="parallel heads: the sum of both outputs, or one projection to both mixers, "
        "the mean of their normed outputs, and one projection of that",
    )
    ssm_in_multiplier: PositiveReal = Field(
        default=1.0, description="parallel heads: factor on the input of Mamba"
    )
    ssm_out_multiplier: PositiveReal = Field(
        default=1.0, description="parallel heads: factor on the output of Mamba"
    )
    attention_in_multiplier: PositiveReal = Field(
        default=1.0, description="parallel heads: factor on the input of attention"
    )
    attention_out_multiplier: PositiveReal = Field(
        default=1.0, description="parallel heads: factor on the output of attention"
    )
    linear_num_key_heads: Positive | None = Field(
        default=None,
        description="gated delta net: query and key heads; null: hidden_size / linear_key_head_dim",
    )
    linear_num_value_heads: Positive | None = Field(
        default=None,
        description="gated delta net: value heads, as many for each key head; null: two",
    )
    linear_key_head_dim: Positive = Field(
        default=128, description="gated delta net: channels of a query and a key"
    )
    linear_value_head_dim: Positive = Field(
        default=128, description="gated delta net: channels of a value"
    )
    mlp_multipliers: MlpMultipliers = Field(
        default=(1.0, 1.0),
        description="MLP: factors on the gate, before the activation, and on the output",
    )
    embedding_multiplier: PositiveReal = Field(
        default=1.0, description="factor on the embeddings of tokens"
    )
    lm_head_multiplier: PositiveReal = Field(default=1.0, description="factor on the logits")
    normalization: Literal["RMSNorm"] = Field(
        default="RMSNorm", description="normalization of a layer"
    )
    layernorm_epsilon: PositiveReal = Field(
        default=1e-5, description="added to the mean square in RMSNorm"
    )
    init_method_std: PositiveReal = Field(
        default=0.02, description="standard deviation of the initial weights"
    )
    vocab_size: Positive | None = Field(
        default=None, description="tokens in the vocabulary before padding; null: the tokenizer's"
    )
    make_vocab_size_divisible_by: Positive = Field(
        default=128,
        description="the vocabulary is padded to a multiple of this; padding takes part in nothing",
    )
    untie_embeddings_and_output_weights: bool = Field(
        default=True, description="the output layer has weights of its own"
    )
    num_meta_tokens: Count = Field(
        default=0,
        description="learnt vectors before every text, which all its tokens see and no loss is of",
    )
    add_bias_linear: bool = Field(default=False, description="biases in attention and MLP linears")
    hidden_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout probability on a layer's output"
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout probability on attention weights"
    )
    num_moe_experts: Positive | None = Field(
        default=None, description="experts of a MoE layer; needed with 'E' in the pattern"
    )
    moe_ffn_hidden_size: Positive | None = Field(
        default=None, description="inner width of one expert; null: ffn_hidden_size"
    )
    moe_router_topk: Positive = Field(default=2, description="experts a token goes to")
    moe_shared_expert_intermediate_size: Positive | None = Field(
        default=None, description="inner width of the expert that every token goes to; null: none"
    )
    moe_latent_size: Positive | None = Field(
        default=None,
        description="width that a MoE layer projects tokens to for its experts, and back from; "
        "null: hidden_size, without projections",
    )
    moe_router_num_groups: Positive | None = Field(
        default=None,
        description="groups of experts, of which a token goes to moe_router_group_topk; null: no "
        "groups",
    )
    moe_router_group_topk: Positive | None = Field(
        default=None,
        description="groups of experts that a token goes to: those whose best "
        "moe_router_topk / moe_router_group_topk experts have the highest scores together",
    )
    mtp_num_layers: Positive | None = Field(
        default=None,
        description="modules of multi-token prediction after the last layer, each for one more "
        "token ahead; in training only; null: none",
    )
    mtp_hybrid_override_pattern: LayerPattern | None = Field(
        default=None, description="layers of each module, of kinds that the model has, such as *E"
    )
    mtp_loss_scaling_factor: PositiveReal = Field(
        default=0.1, description="weight of the mean loss of the modules"
    )
    moe_aux_loss_coeff: Real = Field(default=0.0, description="weight of the load-balancing loss")
    moe_z_loss_coeff: Real | None = Field(
        default=None, description="weight of the router's z-loss; null: none"
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "none"] = Field(
        default="aux_loss",
        description="load-balancing loss over the micro batch, each sample, or none",
    )
    moe_router_score_function: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="how router logits become scores"
    )
    moe_router_pre_softmax: bool = Field(
        default=False, description="softmax before the top-k instead of after it"
    )
    moe_router_topk_scaling_factor: PositiveReal | None = Field(
        default=None, description="factor on the top-k scores; null: none"
    )
    moe_router_enable_expert_bias: bool = Field(
        default=False, description="balance the load by a bias on the scores; needs sigmoid"
    )
    moe_router_bias_update_rate: PositiveReal = Field(
        default=1e-3, description="step of the expert bias at each iteration"
    )
    moe_expert_capacity_factor: PositiveReal | None = Field(
        default=None,
        description="tokens that an expert takes, of an even share; of more, the least "
        "probable are dropped, in training only; null: all",
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = Field(
        default="alltoall", description="how tokens travel to their experts"
    )
    layers: Layers = Field(
        default=FrozenDict(),
        description="sizes of layers that are unlike the others, by layer number (from 1), range "
        "or kind",
    )

    @property
    def padded_vocab_size(self) -> int | None:
        """Rows of the embedding; None while the size of the vocabulary is not known."""
        multiple = self.make_vocab_size_divisible_by
        return None if self.vocab_size is None else -(-self.vocab_size // multiple) * multiple
