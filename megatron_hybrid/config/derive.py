"""Fields that may be left null and follow from others; resolved once, so that nobody asks again."""

from collections.abc import Callable
from pathlib import Path

from megatron_hybrid.config.layer_entries import all_say, mamba_versions
from megatron_hybrid.config.pattern import (
    ATTENTION,
    GDN,
    MAMBA,
    MOE,
    has_kind,
    having,
    parse_pattern,
)
from megatron_hybrid.config.precision import FLOAT8_RECIPES
from megatron_hybrid.config.run import RunConfig


class UnderivableError(Exception):
    """A null field that does not follow from the others; the text is the problem."""


def _ffn_hidden_size(c: RunConfig) -> int:
    return 4 * c.model.hidden_size


def _unset(c: RunConfig, name: str, kind: str, why: str) -> None:
    """Refuse a null size, unless no layer needs it: none is of the kind, or each says its own."""
    if has_kind(c.model.hybrid_layer_pattern, kind) and not all_say(c.model, kind, name):
        raise UnderivableError(
            f"model.{name} is not set, {why}; it must be a whole number of at least 1"
        )


def _num_attention_heads(c: RunConfig) -> None:
    pattern = c.model.hybrid_layer_pattern
    symbols = " and ".join(repr(each) for each in having(ATTENTION) if each in pattern)
    why = f"and model.hybrid_layer_pattern={pattern!r} has {symbols} layers"
    _unset(c, "num_attention_heads", ATTENTION, why)


def _num_moe_experts(c: RunConfig) -> None:
    why = f"and model.hybrid_layer_pattern={c.model.hybrid_layer_pattern!r} has 'E' layers"
    _unset(c, "num_moe_experts", MOE, why)


def _divided(c: RunConfig, kind: str, name: str, whole: tuple[str, int], by: str) -> int | None:
    """A size that is another divided by a third; None where that leaves a rest and every layer of
    the kind says its own.

    Args:
        whole: what is divided, as it is named and its value.
        by: the field that divides it.
    """
    text, value = whole
    divisor: int = getattr(c.model, by)
    if value % divisor == 0:
        return value // divisor
    if all_say(c.model, kind, name):
        return None
    raise UnderivableError(
        f"model.{name} is not set and {text}={value} is not a multiple of model.{by}={divisor}; "
        f"set model.{name}"
    )


_NO_HEADS = "and follows from model.num_attention_heads, which is not set either"


def _num_query_groups(c: RunConfig) -> int | None:
    heads = c.model.num_attention_heads
    if heads is None:
        _unset(c, "num_query_groups", ATTENTION, _NO_HEADS)
    return heads if has_kind(c.model.hybrid_layer_pattern, ATTENTION) else None


def _kv_channels(c: RunConfig) -> int | None:
    heads = c.model.num_attention_heads
    if heads is None:
        _unset(c, "kv_channels", ATTENTION, _NO_HEADS)
    if heads is None or not has_kind(c.model.hybrid_layer_pattern, ATTENTION):
        return None
    width = ("model.hidden_size", c.model.hidden_size)
    return _divided(c, ATTENTION, "kv_channels", width, "num_attention_heads")


def _mamba_num_heads(c: RunConfig) -> int | None:
    if 2 not in mamba_versions(c.model):
        return None
    inner = ("2 * model.hidden_size", 2 * c.model.hidden_size)
    return _divided(c, MAMBA, "mamba_num_heads", inner, "mamba_head_dim")


def _mamba_intermediate_size(c: RunConfig) -> int | None:
    return 2 * c.model.hidden_size if 1 in mamba_versions(c.model) else None


def _mamba_dt_rank(c: RunConfig) -> int | None:
    return -(-c.model.hidden_size // 16) if 1 in mamba_versions(c.model) else None


def _linear_num_key_heads(c: RunConfig) -> int | None:
    if GDN not in c.model.hybrid_layer_pattern:
        return None
    width = ("model.hidden_size", c.model.hidden_size)
    return _divided(c, GDN, "linear_num_key_heads", width, "linear_key_head_dim")


def _linear_num_value_heads(c: RunConfig) -> int | None:
    keys = c.model.linear_num_key_heads
    return 2 * keys if GDN in c.model.hybrid_layer_pattern and keys is not None else None


def _moe_ffn_hidden_size(c: RunConfig) -> int | None:
    return c.model.ffn_hidden_size if MOE in c.model.hybrid_layer_pattern else None


def _virtual_pipeline_size(c: RunConfig) -> int | None:
    stages = c.parallel.pipeline_model_parallel_size
    segments = len(parse_pattern(c.model.hybrid_layer_pattern).segments)
    chunks, rest = divmod(segments, stages)
    return chunks if stages > 1 and chunks > 1 and not rest else None


def _expert_tensor_parallel_size(c: RunConfig) -> int:
    return 1


def _layers_in_bf16(c: RunConfig) -> int:
    recipe = FLOAT8_RECIPES.get(c.precision.recipe)
    return 0 if recipe is None else recipe.end_layers_in_bf16


def _save(c: RunConfig) -> Path:
    return c.run_dir / "checkpoints"


# In this order: a later field may follow from an earlier one. Heads and experts follow from
# nothing: where they are needed and null, no rule reads them.
DERIVED: dict[str, Callable[[RunConfig], object]] = {
    "model.ffn_hidden_size": _ffn_hidden_size,
    "model.num_attention_heads": _num_attention_heads,
    "model.num_moe_experts": _num_moe_experts,
    "model.num_query_groups": _num_query_groups,
    "model.kv_channels": _kv_channels,
    "model.mamba_num_heads": _mamba_num_heads,
    "model.mamba_intermediate_size": _mamba_intermediate_size,
    "model.mamba_dt_rank": _mamba_dt_rank,
    "model.linear_num_key_heads": _linear_num_key_heads,
    "model.linear_num_value_heads": _linear_num_value_heads,
    "model.moe_ffn_hidden_size": _moe_ffn_hidden_size,
    "parallel.virtual_pipeline_model_parallel_size": _virtual_pipeline_size,
    "parallel.expert_tensor_parallel_size": _expert_tensor_parallel_size,
    "precision.num_layers_at_start_in_bf16": _layers_in_bf16,
    "precision.num_layers_at_end_in_bf16": _layers_in_bf16,
    "checkpoint.save": _save,
}
# Of these, the ones that follow the layout and the folder even when a resolved config is taken up
# again with another layout or folder; sizes of the model stay as they were.
FOLLOWING = (
    "parallel.virtual_pipeline_model_parallel_size",
    "precision.num_layers_at_start_in_bf16",
    "precision.num_layers_at_end_in_bf16",
    "checkpoint.save",
)
