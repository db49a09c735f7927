"""Rules beside those of the config, which knows no classes: of what it names.

Loads no more than what is named: most configs name what is ours.
"""

from collections.abc import Iterator

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.rules import Facts, Rule
from megatron_hybrid.errors import ConfigError, UserError
from megatron_hybrid.extensions import load_class
from megatron_hybrid.objectives.registry import objective_fits
from megatron_hybrid.training.callbacks import Callback


def _callbacks_are_there(config: RunConfig, facts: Facts) -> Iterator[str]:
    for word in config.training.callbacks:
        try:
            load_class("training.callbacks", word, Callback)
        except UserError as error:
            yield str(error)


# Classes are there and of the right kind, and the objective fits the config.
NAMED: tuple[Rule, ...] = (_callbacks_are_there, objective_fits)


def check_named(config: RunConfig) -> None:
    """Apply `NAMED` to a config that is valid otherwise.

    Raises:
        ConfigError: each class that cannot be used, and why.
    """
    if problems := [problem for rule in NAMED for problem in rule(config, Facts())]:
        raise ConfigError(problems)
