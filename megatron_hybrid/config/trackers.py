"""Which trackers a config names."""

from typing import Any

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.trackers.base import Target

# What turns each on, what its run is called by, and the package that it needs.
SWITCHES = {"wandb": "project", "mlflow": "experiment"}
NAMES = {"wandb": "exp_name", "mlflow": "run_name"}


def targets(config: RunConfig) -> list[Target]:
    """Where a run's metrics are copied to."""
    found = []
    for kind, switch in SWITCHES.items():
        options = options_of(config, kind)
        if options[switch] is not None:
            name = options[NAMES[kind]] or config.run_dir.name
            values = config.model_dump(mode="json")
            found.append(Target(kind, config.run_dir.absolute(), name, options, values))
    return found


def options_of(config: RunConfig, kind: str) -> dict[str, Any]:
    """The fields of `logging` for a tracker, without its name."""
    prefix = f"{kind}_"
    values = config.logging.model_dump(mode="json")
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
