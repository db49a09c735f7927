"""The Mamba-2 part of a config.json, for the families that name the same fields differently."""

import math
from dataclasses import dataclass
from typing import Any

from checkpoints_converter.family import Fields
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MAMBA
from megatron_hybrid.model.counts import CONV_KERNEL

GATED_NORM_EPSILON = 1e-5  # fixed in megatron-core's mixer and in ours
CHUNK_SIZE = 256  # of transformers' scan; any gives the same result


@dataclass(frozen=True)
class MambaNames:
    """What a family calls the fields; its default, where a config.json may leave one out."""

    epsilon: tuple[str, float]
    heads: tuple[str, int]
    head_dim: tuple[str, int | None]  # None: what `expand` and `heads` leave
    states: tuple[str, int]
    groups: tuple[str, int]
    expand: tuple[str, int]
    conv_kernel: str
    conv_bias: str
    proj_bias: str
    chunk_size: str
    activation: str = "hidden_act"


def cannot_hold_mamba(model: ModelConfig) -> list[str]:
    """Why transformers' mixers of these families cannot compute what ours does."""
    if MAMBA not in model.hybrid_layer_pattern:
        return []
    problems = []
    if model.layernorm_epsilon != GATED_NORM_EPSILON:
        problems.append(
            f"model.layernorm_epsilon={model.layernorm_epsilon} must be {GATED_NORM_EPSILON}: "
            "the gated norm has the same epsilon"
        )
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    if inner % model.hidden_size:
        problems.append(
            f"model.mamba_num_heads={model.mamba_num_heads} of "
            f"model.mamba_head_dim={model.mamba_head_dim} make {inner} channels, which must be a "
            f"multiple of model.hidden_size={model.hidden_size}: it says their number so"
        )
    return problems


def mamba_config(model: ModelConfig, names: MambaNames) -> dict[str, Any]:
    """The fields of config.json of a model with or without Mamba-2 layers."""
    common = {
        names.epsilon[0]: model.layernorm_epsilon,
        names.activation: "silu",
        names.conv_kernel: CONV_KERNEL,
        names.conv_bias: True,
        names.proj_bias: False,
        names.chunk_size: CHUNK_SIZE,
    }
    if MAMBA not in model.hybrid_layer_pattern:
        # Its config checks the sizes even where nothing has them.
        return common | {names.heads[0]: 1, names.head_dim[0]: model.hidden_size,
                         names.expand[0]: 1}  # fmt: skip
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    return common | {
        names.heads[0]: model.mamba_num_heads,
        names.head_dim[0]: model.mamba_head_dim,
        names.states[0]: model.mamba_state_dim,
        names.groups[0]: model.mamba_num_groups,
        names.expand[0]: inner // model.hidden_size,
    }


def mamba_model(fields: Fields, names: MambaNames, hidden_size: int) -> dict[str, Any]:
    """Our fields of a config.json; what a mixer of ours cannot compute goes to the problems."""
    epsilon, default = names.epsilon
    fields.must_be(
        epsilon, GATED_NORM_EPSILON, default=default,
        why="megatron-core's gated norm has no other epsilon",
    )  # fmt: skip
    fields.must_be(
        names.conv_kernel, CONV_KERNEL, default=4, why="the convolution's length is fixed"
    )
    fields.must_be(names.conv_bias, True, default=True, why="the convolution always has a bias")
    fields.must_be(
        names.proj_bias, False, default=False, why="Mamba projections have no biases here"
    )
    fields.must_be(names.activation, "silu", "swish", default="silu", why="the gate is a silu")
    refuse_time_step_limit(fields)
    heads, inner = fields.size(*names.heads), fields.size(*names.expand) * hidden_size
    name, usual = names.head_dim
    auto = fields.get(name, "auto" if usual is None else usual) == "auto"
    head_dim = inner // heads if auto else fields.size(name, usual)
    if heads * head_dim != inner:
        fields.problems.append(
            f"{names.heads[0]}={heads} of {name}={head_dim} must make {names.expand[0]} * "
            f"hidden_size = {inner} channels"
        )
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_state_dim": fields.size(*names.states),
        "mamba_num_groups": fields.size(*names.groups),
    }


def refuse_time_step_limit(fields: Fields) -> None:
    """Step sizes are clamped nowhere here: another `time_step_limit` than [0, inf] is a problem."""
    value = fields.get("time_step_limit", (0.0, math.inf))
    try:
        low, high = (_number(part) for part in value)
    except (TypeError, ValueError, KeyError, AttributeError):
        fields.problems.append(f"time_step_limit={value!r} must be two numbers, [0, inf]")
        return
    if low > 0 or high < math.inf:
        fields.problems.append(
            f"time_step_limit=[{low}, {high}] must be [0, inf]: step sizes are not clamped here"
        )


def _number(value: Any) -> float:
    """A number; transformers writes infinity as `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)
