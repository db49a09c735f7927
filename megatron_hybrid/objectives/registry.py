"""Which objective a config names: one of ours by its name, or a class as `package.module:Class`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_hybrid.config.base import Section
from megatron_hybrid.config.describe import allowed, nearest, shown
from megatron_hybrid.config.rules import Facts
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.extensions import load_class
from megatron_hybrid.model.counts import flops_per_token
from megatron_hybrid.objectives.base import Objective

if TYPE_CHECKING:
    from megatron_hybrid.data.datasets import RunData

FIELD = "training.objective"
# Imported on use.
OBJECTIVES = {
    "pretraining": "megatron_hybrid.objectives.pretraining:Pretraining",
    "sft": "megatron_hybrid.objectives.sft:SupervisedFineTuning",
    "masked_diffusion": "megatron_hybrid.objectives.masked_diffusion:MaskedDiffusion",
    "distillation": "megatron_hybrid.objectives.distillation:Distillation",
    "sft_distillation": "megatron_hybrid.objectives.distillation:SftDistillation",
}


def find_objective(name: str) -> type[Objective]:
    """The class that `training.objective` names.

    Raises:
        UserError: there is none of that name.
    """
    if ":" not in name and name not in OBJECTIVES:
        guess = nearest(name, OBJECTIVES)
        raise UserError(
            f"{FIELD}={name} is not an objective; {f'did you mean {guess}? ' if guess else ''}"
            f"allowed: {', '.join(OBJECTIVES)}, or your own as package.module:Class"
        )
    return load_class(FIELD, OBJECTIVES.get(name, name), Objective)


def objective_fits(config: RunConfig, facts: Facts) -> Iterator[str]:
    """A rule, beside those of the config: its objective is there, and can do what it asks for."""
    try:
        kind = find_objective(config.training.objective)
        options = _options(kind, config)
    except ConfigError as error:
        yield from error.problems
    except UserError as error:
        yield str(error)
    else:
        yield from kind.problems(config, options)
        modules = config.model.mtp_num_layers
        if modules is not None and not kind.next_tokens:
            yield (
                f"model.mtp_num_layers={modules} with {FIELD}={config.training.objective} is not "
                "supported: it is not of next tokens; allowed: null"
            )


def objective_problems(config: RunConfig) -> list[str]:
    """Why a config's objective cannot be used; nothing where it can."""
    return list(objective_fits(config, Facts()))


def data_problems(config: RunConfig, data: "RunData", consumed_samples: int) -> list[str]:
    """Why the objective of a config that has no `objective_problems` cannot be used on a run's
    data; nothing where it can."""
    kind = find_objective(config.training.objective)
    return list(kind.data_problems(config, _options(kind, config), data, consumed_samples))


def build_objective(config: RunConfig) -> Objective:
    """The objective of a config that has no `objective_problems`.

    Raises:
        UserError: it has some.
    """
    kind = find_objective(config.training.objective)
    objective = kind(config, _options(kind, config))
    if config.model.mtp_num_layers is None:
        return objective
    from megatron_hybrid.objectives.multi_token import MultiToken

    return MultiToken(objective)


def frozen_models(config: RunConfig) -> Sequence[RunConfig]:
    """The models that run forward beside the one that a valid config trains.

    Raises:
        UserError: the objective, or one of them, is not there.
    """
    kind = find_objective(config.training.objective)
    return kind.frozen(config, _options(kind, config))


def step_flops_per_token(config: RunConfig, seq_length: int) -> float:
    """Model FLOPs of a step on one token of a sequence of `seq_length` tokens: to train the model,
    forward and backward, and to run frozen ones forward."""
    frozen = sum(flops_per_token(each.model, seq_length).total for each in frozen_models(config))
    return flops_per_token(config.model, seq_length).total + frozen / 3


def objective_options(config: RunConfig) -> Section | None:
    """The options of a config's objective; None: it has none.

    Raises:
        UserError: the objective is not there, or they are not its options.
    """
    return _options(find_objective(config.training.objective), config)


def _options(kind: type[Objective], config: RunConfig) -> Section | None:
    values, name = config.training.objective_options, config.training.objective
    section = kind.Options
    if section is None:
        if values:
            raise ConfigError(
                [f"{FIELD}_options={shown(dict(values))}: {FIELD}={name} has no options"]
            )
        return None
    try:
        return section(**values)
    except ValidationError as error:
        places = [str(each["loc"][0]) for each in error.errors() if each["loc"]]
        raise ConfigError(
            [_option_problem(section, place, values, name) for place in dict.fromkeys(places)]
        ) from error


def _option_problem(
    section: type[Section], name: str, values: Mapping[str, Any], objective: str
) -> str:
    known, path = section.model_fields, f"{FIELD}_options.{name}"
    if name not in known:
        guess = nearest(name, known)
        hint = f"did you mean {guess}? " if guess else ""
        return f"{path} is not an option of {objective}; {hint}allowed: {', '.join(known)}"
    if name not in values:
        return f"{path} is not set; it must be {allowed(known[name])}"
    return f"{path}={shown(values[name])} must be {allowed(known[name], values[name])}"
