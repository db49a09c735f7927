"""The sizes of each layer of the smaller model, and its config."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.saved_config import FUNCTION_FIELDS, SHAPE_FIELDS
from megatron_hybrid.checkpoint.source_model import derived_values
from megatron_hybrid.compression.request import CUT, Request, has_axes, refusal, stages
from megatron_hybrid.config import ModelConfig, RunConfig, load_config, rules
from megatron_hybrid.config.flags import parse_command_line
from megatron_hybrid.config.layers import MULTIPLIED, Layer, layers
from megatron_hybrid.config.pattern import MOE, has_kind
from megatron_hybrid.errors import ConfigError

# What may be said beside the options: it changes no tensor.
_MAY_CHANGE = {f"model.{name}" for name in FUNCTION_FIELDS} | {
    "model.mtp_num_layers", "model.mtp_hybrid_override_pattern",
    "model.make_vocab_size_divisible_by",
}  # fmt: skip
_LOADING = (
    "checkpoint.load",
    "checkpoint.finetune",
    "checkpoint.load_optim",
    "checkpoint.load_rng",
)


@dataclass(frozen=True)
class Kept:
    """A layer of the parent that stays.

    Attributes:
        parent: as it is there.
        number: its place in the smaller model, from 1.
        sizes: of `CUT`, what it has of them.
    """

    parent: Layer
    number: int
    sizes: dict[str, int]


def kept_layers(model: ModelConfig, request: Request, dropped: set[int]) -> list[Kept]:
    """The layers that stay, with the sizes that they are to have."""
    found: list[Kept] = []
    for layer in layers(model):
        if layer.number in dropped:
            continue
        sizes = {}
        for name, kind in CUT.items():
            has = getattr(layer.model, name)
            if kind != layer.kind or not has_axes(layer) or has is None:
                continue
            sizes[name] = request.sizes.get(name, has)
            for numbers, said, value in request.of_layers:
                if said == name and layer.number in numbers:
                    sizes[name] = value
        found.append(Kept(layer, len(found) + 1, sizes))
    return found


def word_problems(parent: RunConfig, words: Sequence[str]) -> list[str]:
    """What is typed that the options decide, and what must be typed of a model with modules of
    multi-token prediction.
    """
    typed = dict(parse_command_line(words).values)
    found = []
    for path, value in typed.items():
        if path.startswith("model.") and path not in _MAY_CHANGE:
            field = path.removeprefix("model.").partition(".")[0]
            is_shape = field in (*SHAPE_FIELDS, "layers")
            decides = "the options decide it" if is_shape else "the parent's model decides it"
            found.append(f"{path}={value} cannot be set here: {decides}")
        if path.startswith("upcycling.") or path in _LOADING:
            found.append(f"{path}={value} cannot be set here: it is of the run that goes on")
    modules = parent.model.mtp_num_layers
    if modules is not None and typed.get("model.mtp_num_layers", modules) is not None:
        found.append(
            f"model.mtp_num_layers={modules}: modules of multi-token prediction are not cut yet; "
            "allowed: model.mtp_num_layers=null, which leaves them out"
        )
    return found


def pruned_config(
    parent: RunConfig, request: Request, kept: Sequence[Kept], save: Path, words: Sequence[str]
) -> RunConfig:
    """The config of the smaller model, to be trained from a checkpoint at `save`.

    Args:
        kept: its layers.
        save: the folder of checkpoints to be.
        words: changes on top, as on a command line.

    Raises:
        UserError: the smaller model breaks a rule of its layout or its training, or the words do.
    """
    values = derived_values(parent, save)
    values["model"] |= _model_values(parent.model, request, kept)
    if dict(parse_command_line(words).values).get("model.mtp_num_layers", 0) is None:
        values["model"]["mtp_hybrid_override_pattern"] = None
    try:
        return load_config(words, which=rules.NO_FILES, base=values)
    except ConfigError as error:
        raise refusal(error.problems) from error


def _model_values(model: ModelConfig, request: Request, kept: Sequence[Kept]) -> dict[str, Any]:
    """Fields of the smaller model that differ from the parent's."""
    stay = {each.parent.number for each in kept}
    dropped = {each.number for each in layers(model)} - stay
    whole: dict[str, Any] = {**request.sizes}
    own: dict[str, dict[str, Any]] = {}
    for each in kept:
        sizes = each.parent.sizes | each.sizes
        unlike = {
            name: value
            for name, value in sizes.items()
            if value != whole.get(name, getattr(model, name))
        }
        if unlike:
            own[str(each.number)] = unlike
    pattern = stages(model.hybrid_layer_pattern, dropped)
    return (
        _of_kinds_gone(pattern)
        | whole
        | {
            "hybrid_layer_pattern": pattern,
            "hidden_size": request.hidden_size or model.hidden_size,
            "layers": own,
        }
    )


def _of_kinds_gone(pattern: str) -> dict[str, Any]:
    """Fields of kinds of layers that a pattern has none of, at their defaults."""
    gone = [name for name, kind in MULTIPLIED.items() if not has_kind(pattern, kind)]
    if not has_kind(pattern, MOE):
        gone += [n for n in ModelConfig.model_fields if n.startswith(("moe_", "num_moe_experts"))]
    usual = ModelConfig.model_construct(hybrid_layer_pattern="", hidden_size=1)
    values = usual.model_dump(mode="json", include=set(gone))
    return {name: values[name] for name in gone}
