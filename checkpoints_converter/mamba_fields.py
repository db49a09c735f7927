"""The Mamba-2 part of a config.json, for the families that name the same fields differently."""

import math
from dataclasses import dataclass
from typing import Any

from checkpoints_converter.fields import (
    Fields,
    MustBe,
    NoEffect,
    Parsed,
    Rules,
    Whole,
)
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.pattern import MAMBA, has_kind
from megatron_hybrid.model.counts import CONV_KERNEL

GATED_NORM_EPSILON = 1e-5  # fixed in megatron-core's mixer and in ours
# Of the families other than nemotron_h, in transformers.
GROUPED_NORM_SINCE = "5.23.0"
CHUNK_SIZE = 256  # of transformers' scan; any gives the same result
DRAWN = NoEffect("how initial weights are drawn")


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


def cannot_hold_mamba(model: ModelConfig, *, by_expand: bool = True) -> list[str]:
    """Why transformers' mixers of these families cannot compute what ours does.

    Args:
        by_expand: the number of inner channels is said as a multiple of the hidden size.
    """
    if not has_kind(model.hybrid_layer_pattern, MAMBA):
        return []
    problems = []
    if model.mamba_rms_norm and model.layernorm_epsilon != GATED_NORM_EPSILON:
        problems.append(
            f"model.layernorm_epsilon={model.layernorm_epsilon} must be {GATED_NORM_EPSILON}: "
            "the gated norm has the same epsilon"
        )
    assert model.mamba_num_heads is not None
    inner = model.mamba_num_heads * model.mamba_head_dim
    if by_expand and inner % model.hidden_size:
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
    if not has_kind(model.hybrid_layer_pattern, MAMBA):
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


def mamba_rules(names: MambaNames) -> Rules:
    """The fields that say what a mixer computes. `names.activation` is a rule of the family's."""
    head_dim, usual = names.head_dim
    return {
        names.conv_kernel: MustBe(
            default=4, allowed=(CONV_KERNEL,), layers=MAMBA, why="the convolution's length is fixed"
        ),
        names.conv_bias: MustBe(
            default=True, allowed=(True,), layers=MAMBA, why="the convolution always has a bias"
        ),
        names.proj_bias: MustBe(
            default=False,
            allowed=(False,),
            layers=MAMBA,
            why="Mamba projections have no biases here",
        ),
        names.heads[0]: Whole(default=names.heads[1], layers=MAMBA),
        head_dim: Whole(default=usual, layers=MAMBA)
        if usual is not None
        else Parsed(default="auto", function=_head_dim, layers=MAMBA),
        names.states[0]: Whole(default=names.states[1], layers=MAMBA),
        names.groups[0]: Whole(default=names.groups[1], layers=MAMBA),
        names.expand[0]: Whole(default=names.expand[1], layers=MAMBA),
        names.chunk_size: NoEffect("how a sequence is cut for the scan", default=CHUNK_SIZE),
        "time_step_limit": TIME_STEP_LIMIT,
        # Earlier releases of transformers write the first two for every family.
        **dict.fromkeys(
            ("time_step_min", "time_step_max", "time_step_floor", "time_step_rank"), DRAWN
        ),
    }


def mamba_model(fields: Fields, names: MambaNames, hidden_size: int) -> dict[str, Any]:
    """Our fields of a config.json; what a mixer of ours cannot compute goes to the problems."""
    refuse_other_epsilon(fields, names.epsilon[0])
    inner = fields[names.expand[0]] * hidden_size
    return mamba_sizes(fields, names, inner, f"{names.expand[0]} * hidden_size")


def mamba_sizes(fields: Fields, names: MambaNames, inner: int, whose: str) -> dict[str, Any]:
    """Our fields of a mixer's sizes.

    Args:
        inner: channels of all heads.
        whose: what says them.
    """
    name = names.head_dim[0]
    heads = fields[names.heads[0]]
    head_dim = max(1, inner // heads) if fields[name] == "auto" else fields[name]
    if heads * head_dim != inner:
        fields.problems.append(
            f"{names.heads[0]}={heads} of {name}={head_dim} must make {whose} = {inner} channels"
        )
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_state_dim": fields[names.states[0]],
        "mamba_num_groups": fields[names.groups[0]],
    }


def refuse_other_epsilon(fields: Fields, name: str) -> None:
    """A model with Mamba-2 layers has one epsilon only."""
    if fields[name] != GATED_NORM_EPSILON:
        fields.problems.append(
            f"{name}={fields[name]!r} must be {GATED_NORM_EPSILON}: megatron-core's gated norm has "
            "no other epsilon"
        )


def note_residual(fields: Fields) -> None:
    """Say that here the residual stream is not kept in fp32."""
    if fields["residual_in_fp32"]:
        fields.notes.append(
            "residual_in_fp32=True: in half precision its residual stream is in fp32, here it has "
            "the precision of the run"
        )


def _head_dim(value: Any) -> Any:
    if value == "auto":
        return value
    return Whole().read(value)


def _time_step_limit(value: Any) -> tuple[float, float]:
    """Two numbers; transformers writes infinity as `{"__float__": "Infinity"}`."""
    try:
        low, high = (_number(part) for part in value)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError("must be two numbers, [0, inf]") from None
    if not (low <= 0 and high == math.inf):
        raise ValueError("must be [0, inf]: step sizes are not clamped here")
    return low, high


def _number(value: Any) -> float:
    if isinstance(value, dict):
        value = {"Infinity": math.inf, "-Infinity": -math.inf}[value["__float__"]]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(value)
    return float(value)


TIME_STEP_LIMIT = Parsed(default=(0.0, math.inf), function=_time_step_limit, layers=MAMBA)
