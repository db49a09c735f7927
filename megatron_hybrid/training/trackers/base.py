"""What a tracker is: where rows go, and what it says that it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_hybrid.training.trackers.rows import Row


@dataclass(frozen=True)
class Target:
    """Which run of which service a run's metrics are copied to.

    Attributes:
        kind: "wandb" or "mlflow".
        run_dir: the run's folder.
        name: of the run, for people.
        options: fields of `logging` that begin with the kind, without it, such as "project".
        config: the run's whole config, as plain values.
        begins_after: steps that were done when the run started; None: it is no start of it.
    """

    kind: str
    run_dir: Path
    name: str
    options: Mapping[str, Any]
    config: Mapping[str, Any]
    begins_after: int | None = None


class Tracker(Protocol):
    """One run in a service. Any method may raise anything: the service may be away."""

    @property
    def last_step(self) -> int:
        """That the service has, once it is open; -1: it has none."""

    def open(self, known: str | None, remember: Callable[[str], None]) -> None:
        """Find the run, or make it; from then on `has` can be asked.

        Args:
            known: the run's id in the service, of an earlier start; None: there is none yet.
            remember: to be called with the id before anything is sent.
        """

    def send(self, row: Row) -> None:
        """Send a row, without what is there already."""

    def close(self, reason: str | None) -> None:
        """Say how the run ended: "finished", "SIGTERM", ...; None: it was cut off."""
