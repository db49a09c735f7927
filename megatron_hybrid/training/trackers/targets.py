"""Which trackers a config names."""

from typing import Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.training.trackers.base import Target

# What turns each on, and what its run is called by.
_SWITCHES = {"wandb": "project", "mlflow": "experiment"}
_NAMES = {"wandb": "exp_name", "mlflow": "run_name"}


def targets(config: RunConfig, begins_after: int | None = None) -> list[Target]:
    """Where a run's metrics are copied to.

    Args:
        begins_after: as of `Target`.
    """
    found = []
    for kind, switch in _SWITCHES.items():
        options = _options(config, kind)
        if options[switch] is not None:
            name = options[_NAMES[kind]] or config.run_dir.name
            values = config.model_dump(mode="json")
            run_dir = config.run_dir.absolute()
            found.append(Target(kind, run_dir, name, options, values, begins_after))
    return found


def _options(config: RunConfig, kind: str) -> dict[str, Any]:
    """The fields of `logging` for a tracker, without its name."""
    prefix = f"{kind}_"
    values = config.logging.model_dump(mode="json")
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
