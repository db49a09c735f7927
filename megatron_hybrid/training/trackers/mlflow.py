"""MLflow: a run of an experiment, in a folder, a database or behind a server."""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_hybrid.training.trackers.base import Target
from megatron_hybrid.training.trackers.rows import Row

FOLDER = "mlruns"  # in the run's folder, where neither the config nor the environment says another
_MOST = 100  # parameters that one call may send
_LONGEST = 500  # characters of a parameter


class MLflow:
    """Options: `experiment`; `run_name`; `tracking_uri`, None: MLFLOW_TRACKING_URI, or a folder of
    the run.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._last: dict[str, int] = {}  # the last step of each metric that is there

    def open(self, known: str | None, remember: Callable[[str], None]) -> None:
        import os

        # A server that is away is to be noticed; the whole is tried again later.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        options = self._target.options
        uri = options["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow asks that whoever wants files rather than a database says so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (self._target.run_dir / FOLDER).absolute().as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        if known is None:
            experiment = self._client.get_experiment_by_name(options["experiment"])
            identity = (
                self._client.create_experiment(options["experiment"])
                if experiment is None
                else experiment.experiment_id
            )
            run = self._client.create_run(identity, run_name=self._target.name)
            known = run.info.run_id
            remember(known)
            self._send_config(known)
        else:
            run = self._client.get_run(known)
            self._client.update_run(known, status="RUNNING", name=self._target.name)
            self._tell_changes(known, run.data.params, run.data.tags)
        self._run = known
        self._last = {
            key: max(metric.step for metric in self._client.get_metric_history(known, key))
            for key in run.data.metrics
        }

    @property
    def last_step(self) -> int:
        return max(self._last.values(), default=-1)

    def send(self, row: Row) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(tag, value, now, row.step)
            for tag, value in ((_as_name(tag), value) for tag, value in row.values.items())
            if row.step > self._last.get(tag, -1)
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
            self._last |= {metric.key: row.step for metric in metrics}

    def close(self, reason: str | None) -> None:
        # A run that was told to end goes on later, as one that was cut off may.
        status = "FINISHED" if reason == "finished" else "KILLED" if reason else "FAILED"
        self._client.set_terminated(self._run, status)

    def _tell_changes(self, run: str, was: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Parameters stay those of the first start, as MLflow has it: tags tell what is otherwise
        now."""
        config = self._target.config
        # Of what a mapping has no longer, as a layer that is like the others again.
        gone = dict.fromkeys(name for name in was if name.partition(".")[0] in config)
        for name, value in (gone | _parameters(config)).items():
            tag, now = f"now.{name}", _as_text(value)
            if tags.get(tag, was.get(name, _as_text(None))) != now:
                self._client.set_tag(run, tag, now)

    def _send_config(self, run: str) -> None:
        from mlflow.entities import Param

        parameters = [
            Param(name, _as_text(value))
            for name, value in _parameters(self._target.config).items()
            if value is not None
        ]
        for first in range(0, len(parameters), _MOST):
            self._client.log_batch(run, params=parameters[first : first + _MOST])


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value)[:_LONGEST]


def _as_name(tag: str) -> str:
    """MLflow takes a whole row or nothing, and no "exact_match,strict" of a task."""
    return re.sub(r"[^\w.:/ -]", "_", tag)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config under names that MLflow takes: not "layers.*" or "sources.c++"."""
    found: dict[str, Any] = {}
    for name, value in _flat(config):
        name = _as_name(name)
        while name in found:
            name += "_"
        found[name] = value
    return found


def _flat(values: Mapping[str, Any], place: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        path = f"{place}{name}"
        found += _flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, value)]
    return found
