"""The plan of a run's data as it travels in a checkpoint: `data_plan.json`."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.plan import Plan
from megatron_hybrid.json_text import parse_json
from megatron_hybrid.small_files import naming, read_json

DATA_PLAN_FILE = "data_plan.json"


@dataclass(frozen=True)
class SavedPlan:
    """A plan, and how many of its samples were read when the checkpoint was made."""

    plan: Plan
    consumed_samples: int

    def to_json(self) -> str:
        """The content of the file."""
        plan = parse_json(self.plan.to_json())
        return json.dumps({"consumed_samples": self.consumed_samples, "plan": plan}, indent=1)


def read_saved_plan(checkpoint: Path) -> SavedPlan | None:
    """The plan in a checkpoint's folder; None where there is none.

    A checkpoint has none with made-up data, in megatron-core's order, and from other programs.

    Raises:
        DataError: the file is damaged, or of another version.
    """
    path = checkpoint / DATA_PLAN_FILE
    if not path.exists():
        return None
    content = read_json(path, DataError, fields=("consumed_samples", "plan"))
    with naming(path, DataError):
        plan = Plan.from_json(json.dumps(content["plan"]))
        consumed_samples = content["consumed_samples"]
        if type(consumed_samples) is not int or not 0 <= consumed_samples <= plan.samples:
            raise ValueError(f"consumed_samples={consumed_samples!r} of {plan.samples}")
        return SavedPlan(plan, consumed_samples)
