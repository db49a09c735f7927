"""MoE: now and then each expert's share of a step's tokens, in `metrics.jsonl`."""

from typing import TYPE_CHECKING

from megatron_hybrid.training.callbacks.base import Callback, Step

if TYPE_CHECKING:
    from megatron_hybrid.training.expert_load import ExpertLoad
    from megatron_hybrid.training.trainer import Trainer


class ExpertLoadRecords(Callback):
    """Args: `interval`, iterations between records."""

    def __init__(self, interval: int) -> None:
        self._interval = interval

    def after_step(self, run: "Trainer", step: Step) -> None:
        load: ExpertLoad | None = step.result.readings.get("expert_load")
        if load is None or not run.due(self._interval):
            return
        shares = [[round(share, 6) for share in row] for row in load.rows]
        run.record("expert_load", {"layers": list(load.layers), "shares": shares})
