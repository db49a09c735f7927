"""The fields of a Nemotron-H config.json, in the spellings of its releases."""

from dataclasses import replace
from typing import Any

from checkpoints_converter.common_fields import COMMON
from checkpoints_converter.fields import (
    MOST_LAYERS,
    Flag,
    MustBe,
    NoEffect,
    Number,
    Parsed,
    Rules,
    Whole,
)
from checkpoints_converter.mamba_fields import DRAWN, TIME_STEP_LIMIT
from megatron_hybrid.config.pattern import (
    ATTENTION,
    MAMBA,
    MLP,
    MOE,
    SEPARATOR,
    pattern_problems,
)
from megatron_hybrid.model.counts import CONV_KERNEL

_LAYER_TYPES = {"linear_attention": MAMBA, "mamba": MAMBA, "full_attention": ATTENTION,
                "attention": ATTENTION, "mlp": MLP, "moe": MOE}  # fmt: skip
ACTIVATIONS = {"relu2": "squared_relu", "gelu": "gelu"}


def _layers(value: Any) -> str:
    """Our pattern of one of theirs: a text of the same symbols, or a list of names."""
    if isinstance(value, str) and len(value) <= MOST_LAYERS:
        if problems := pattern_problems(value):
            raise ValueError(f"is no pattern of layers: {problems[0]}")
        if SEPARATOR in value:
            raise ValueError(f"is no pattern of layers: {SEPARATOR!r} is none")
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a list of kinds of layers, or hybrid_override_pattern a text of their symbols"
        )
    unknown = sorted({str(name) for name in value if str(name) not in _LAYER_TYPES})
    if unknown:
        raise ValueError(f"has {', '.join(unknown)}; allowed: {', '.join(_LAYER_TYPES)}")
    return "".join(_LAYER_TYPES[name] for name in value)


_NO_POSITIONS = NoEffect("its attention has no positions")
_NO_PREDICTION = NoEffect("of the layers that predict more tokens, which are left out")
FIELDS: Rules = {
    **COMMON,
    "layers_block_type": Parsed(
        function=_layers, also=("layer_types", "hybrid_override_pattern"), stand_in=MAMBA
    ),
    "num_hidden_layers": Whole(nullable=True),
    "num_nextn_predict_layers": Whole(least=0, default=0, nullable=True),
    "hidden_size": Whole(default=4096),
    "vocab_size": Whole(default=131072),
    "max_position_embeddings": Whole(default=4096),
    "layer_norm_epsilon": Number(default=1e-5, above=0, agree=("rms_norm_eps", "norm_eps")),
    "initializer_range": Number(default=0.02, above=0),
    "hidden_dropout": Number(default=0.0, least=0, below=1),
    "residual_in_fp32": Flag(default=False),
    # Attention.
    "num_attention_heads": Whole(default=32, layers=ATTENTION),
    "num_key_value_heads": Whole(
        default=8, nullable=True, layers=ATTENTION, also=("num_query_groups",)
    ),
    "head_dim": Whole(default=128, layers=ATTENTION, also=("attention_head_dim",)),
    "attention_bias": MustBe(
        default=False, allowed=(False,), layers=ATTENTION, why="no biases in attention alone"
    ),
    "attention_dropout": Number(default=0.0, least=0, below=1, layers=ATTENTION),
    "sliding_window": MustBe(
        default=None, allowed=(None,), layers=ATTENTION,
        why="some programs attend within it, and transformers does not",
    ),
    # MLPs and experts.
    "intermediate_size": Whole(default=21504, layers=MLP),
    "mlp_hidden_act": MustBe(
        default="relu2", allowed=ACTIVATIONS, layers=MLP + MOE, why="there is no such MLP here"
    ),
    "mlp_bias": MustBe(
        default=False, allowed=(False,), layers=MLP + MOE, why="biases of MLP layers alone"
    ),
    "n_routed_experts": Whole(default=8, layers=MOE, also=("num_local_experts",)),
    "n_shared_experts": MustBe(
        default=1, allowed=(1,), layers=MOE,
        why="moe_shared_expert_intermediate_size is the width of all shared experts together",
    ),
    "moe_intermediate_size": Whole(default=7688, layers=MOE),
    "moe_shared_expert_intermediate_size": Whole(default=7688, layers=MOE),
    "moe_latent_size": Whole(nullable=True, layers=MOE),
    "num_experts_per_tok": Whole(default=2, layers=MOE),
    "routed_scaling_factor": Number(default=1.0, above=0, layers=MOE),
    "n_group": Whole(default=1, layers=MOE),
    "topk_group": Whole(default=1, layers=MOE),
    "norm_topk_prob": Flag(default=True, layers=MOE),
    # Mamba-2.
    "mamba_num_heads": Whole(default=128, layers=MAMBA),
    "mamba_head_dim": Whole(default=64, layers=MAMBA),
    "ssm_state_size": Whole(default=128, layers=MAMBA),
    "n_groups": Whole(default=8, layers=MAMBA, also=("mamba_n_groups",)),
    "conv_kernel": MustBe(
        default=4, allowed=(CONV_KERNEL,), layers=MAMBA, also=("mamba_d_conv",),
        why="the convolution's length is fixed",
    ),
    "use_conv_bias": MustBe(
        default=True, allowed=(True,), layers=MAMBA, also=("mamba_conv_bias",),
        why="the convolution always has a bias",
    ),
    "use_bias": MustBe(
        default=False, allowed=(False,), layers=MAMBA, why="Mamba projections have no biases here"
    ),
    "mamba_proj_bias": MustBe(
        default=False, allowed=(False,), layers=MAMBA, why="Mamba projections have no biases here"
    ),
    "mamba_hidden_act": MustBe(
        default="silu", allowed=("silu", "swish"), layers=MAMBA, why="the gate is a silu"
    ),
    "time_step_limit": replace(TIME_STEP_LIMIT, also=("mamba_dt_limit",)),
    "time_step_min": Number(default=0.001, layers=MAMBA, also=("mamba_dt_min",)),
    "time_step_max": replace(DRAWN, also=("mamba_dt_max",), default=0.1),
    "time_step_floor": replace(DRAWN, also=("mamba_dt_init_floor",), default=1e-4),
    "time_step_rank": DRAWN,
    "rescale_prenorm_residual": DRAWN,
    "expand": NoEffect("the number and size of heads say it", also=("mamba_expand",)),
    "chunk_size": NoEffect("how a sequence is cut for the scan", also=("mamba_chunk_size",)),
    "mamba_ssm_cache_dtype": NoEffect("how states are kept while text is generated"),
    "moe_shared_expert_overlap": NoEffect("when the shared expert computes"),
    "mtp_layers_block_type": _NO_PREDICTION,
    "mtp_hybrid_override_pattern": _NO_PREDICTION,
    **dict.fromkeys(
        ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"), _NO_POSITIONS
    ),
}  # fmt: skip
