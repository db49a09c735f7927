"""`metrics.jsonl` as it grows, as rows of numbers: what is sent to a tracker."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_hybrid.small_files import naming

# As TensorBoard has them.
TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "consumed_tokens": "progress/consumed_tokens",
    "tokens_per_s": "throughput/tokens_per_s",
    "model_tflops_per_rank": "throughput/model_tflops_per_rank",
    "step_ms": "throughput/step_ms",
    "peak_memory_gib": "memory/peak_gib",
}


@dataclass(frozen=True)
class Row:
    """Attributes: `step`; `values`, all numbers of the records of this step, by their tags."""

    step: int
    values: dict[str, float]


class Rows:
    """Reads on from where it stood.

    A row is given out once it is whole: when a record of a later step is there, or nothing more
    will come. An evaluation belongs to the row of the step before it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._row = Row(0, {})

    def read(self, *, last: bool) -> Iterator[Row]:
        """The rows that have become whole; `last`: and the one that has not."""
        for record in self._records():
            with naming(self._path):
                values = scalars(record)
            if not values:
                continue
            if record["iteration"] != self._row.step:
                yield from self._whole()
                self._row = Row(record["iteration"], {})
            self._row.values.update(values)
        if last:
            yield from self._whole()
            self._row = Row(self._row.step, {})

    def _whole(self) -> Iterator[Row]:
        if self._row.values:
            yield self._row

    def _records(self) -> Iterator[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with naming(self._path):
                record = orjson.loads(line)
            yield record


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record of `metrics.jsonl`, by tag; those that are not finite are left out.

    Kinds other than "train" and "validation" have none.
    """
    found: dict[str, Any]
    if record["kind"] == "train":
        found = {tag: record.get(name) for name, tag in TAGS.items()}
        found |= {f"train/{name}": value for name, value in record.get("extra", {}).items()}
        for field, tag in (("source_tokens", "data/tokens"), ("source_epochs", "data/epochs")):
            found |= {f"{tag}/{name}": value for name, value in record.get(field, {}).items()}
        found |= _expert_load(record.get("expert_load") or {"layers": []})
    elif record["kind"] == "validation":
        found = {"validation/loss": record["loss"]}
        found |= {f"validation/{name}": value for name, value in record.get("extra", {}).items()}
    else:
        return {}
    return {tag: float(value) for tag, value in found.items() if value is not None}


def _expert_load(load: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"expert_load/{name}/layer_{number}": value
        for name, each in load.items()
        if name != "layers"
        for number, value in zip(load["layers"], each, strict=True)
    }
