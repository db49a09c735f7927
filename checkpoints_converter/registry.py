"""The families that can be converted. A new one is a module with a `FAMILY`, and a line here."""

from importlib import import_module

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.family import Family
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.config.layers import (
    in_the_model,
    mamba1_problem,
    multiplied,
    shown_size,
    unlike_problem,
)
from megatron_hybrid.config.pattern import GDN, PARALLEL

# model_type -> module; in the order in which they are tried for a model of ours.
MODULES = {
    "nemotron_h": "checkpoints_converter.nemotron_h",
    "mamba2": "checkpoints_converter.mamba2",
    "bamba": "checkpoints_converter.bamba",
    "granitemoehybrid": "checkpoints_converter.granitemoehybrid",
    "falcon_h1": "checkpoints_converter.falcon_h1",
    "hymba": "checkpoints_converter.hymba",
}


# Families that come to mind, and why our layers cannot hold them exactly.
_NOT_HELD = {
    "zamba2": "its attention layers share their weights; here each has its own",
}


# Its families read the sizes of all layers from one place, and fail where `per_layer_config` gives
# some layers others; a test notices the release that does not.
_EXPORT = "an export, as transformers up to 5.24 builds no such model,"


def family(model_type: str | None) -> Family:
    """A family by the `model_type` of its config.json.

    Raises:
        ConversionError: it is not one of ours.
    """
    if not isinstance(model_type, str) or model_type not in MODULES:
        why = f": {_NOT_HELD[str(model_type)]}" if str(model_type) in _NOT_HELD else ""
        raise ConversionError(
            f"model_type={model_type!r} is not supported{why}; allowed: {', '.join(MODULES)}"
        )
    found = import_module(MODULES[model_type]).FAMILY
    assert isinstance(found, Family)
    return found


def _not_held(model: ModelConfig, candidate: Family) -> list[str]:
    """What few families have: layers of parallel heads, and factors."""
    pattern = model.hybrid_layer_pattern
    problems = [
        f"model.{name}={shown_size(getattr(model, name))} must be {shown_size(usual)}: "
        "it has no such thing"
        for name, usual in multiplied(model).items()
        if name not in candidate.multiplied
    ]
    if GDN in pattern:
        problems.append(
            f"model.hybrid_layer_pattern={pattern!r} must have no '{GDN}': no family that is known "
            "here has gated delta nets"
        )
    if PARALLEL in pattern and not candidate.parallel_heads:
        problems.append(
            f"model.hybrid_layer_pattern={pattern!r} must have no '{PARALLEL}': "
            "its layers have one mixer each"
        )
    return problems


def family_for(model: ModelConfig, model_type: str | None = None) -> Family:
    """The family that holds a model of ours exactly.

    Args:
        model_type: the one to use; None for the first that can.

    Raises:
        ConversionError: the model cannot be held, with every field that stands against it.
    """
    problem = mamba1_problem(model, _EXPORT) or unlike_problem(model, _EXPORT)
    reasons = []
    for name in [model_type] if model_type else MODULES:
        candidate = family(name)
        if problem and not candidate.takes_unlike:
            continue
        asked = model if candidate.takes_unlike else in_the_model(model)
        problems = _not_held(asked, candidate) or candidate.cannot_hold(asked)
        if not problems:
            return candidate
        reasons.append(f"{name} cannot hold this model exactly:")
        reasons += [f"  - {each}" for each in problems]
    if problem and not (model_type and reasons):
        raise ConversionError(problem)
    raise ConversionError("\n".join(reasons))
