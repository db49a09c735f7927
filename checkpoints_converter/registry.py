"""The families that can be converted. A new one is a module with a `FAMILY`, and a line here."""

from importlib import import_module

from checkpoints_converter.errors import ConversionError
from checkpoints_converter.family import Family
from megatron_hybrid.config import ModelConfig

# model_type -> module; in the order in which they are tried for a model of ours.
MODULES = {
    "nemotron_h": "checkpoints_converter.nemotron_h",
    "mamba2": "checkpoints_converter.mamba2",
    "bamba": "checkpoints_converter.bamba",
    "granitemoehybrid": "checkpoints_converter.granitemoehybrid",
}


def family(model_type: str | None) -> Family:
    """A family by the `model_type` of its config.json.

    Raises:
        ConversionError: it is not one of ours.
    """
    if model_type not in MODULES:
        raise ConversionError(f"model_type={model_type!r} is not supported; {', '.join(MODULES)}")
    found = import_module(MODULES[model_type]).FAMILY
    assert isinstance(found, Family)
    return found


def family_for(model: ModelConfig, model_type: str | None = None) -> Family:
    """The family that holds a model of ours exactly.

    Args:
        model_type: the one to use; None for the first that can.

    Raises:
        ConversionError: the model cannot be held, with every field that stands against it.
    """
    reasons = []
    for name in [model_type] if model_type else MODULES:
        candidate = family(name)
        problems = candidate.cannot_hold(model)
        if not problems:
            return candidate
        reasons.append(f"{name} cannot hold this model exactly:")
        reasons += [f"  - {problem}" for problem in problems]
    raise ConversionError("\n".join(reasons))
