"""Emulated float8: now and then how the operands of each linear fit the format."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_hybrid.model.float8 import Float8Linear, float8_linears
from megatron_hybrid.ops.float8 import ROLES, Fit
from megatron_hybrid.training.callbacks.base import Callback, Step

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer


class Float8Fit(Callback):
    """Counts in one step of many, on all ranks.

    Args:
        interval: iterations between records.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._linears: dict[str, Float8Linear] = {}
        self._counts = False

    def on_run_start(self, run: "Trainer") -> None:
        self._linears = float8_linears(run.model)

    def before_step(self, run: "Trainer") -> None:
        self._counts = (run.progress.iteration + 1) % self._interval == 0
        if self._counts:
            for linear in self._linears.values():
                linear.fit = Fit()

    def after_step(self, run: "Trainer", step: Step) -> None:
        if not self._counts:
            return
        own = {name: linear.fit for name, linear in self._linears.items()}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        for linear in self._linears.values():
            linear.fit = None
        if any(everywhere):
            run.record("float8", summary(everywhere))


def summary(fits: Sequence[dict[str, Fit]]) -> dict[str, Any]:
    """The fits of all ranks, by linear: the record that `metrics.jsonl` keeps.

    Returns:
        "linears": their names, as "3.mixer.in_proj", in the order of the layers; and by role
        ("input", "weight", "gradient") "amax", "underflow" (the share of numbers other than 0 that
        became 0) and "saturated" (the share that was cut off), a number a linear.
    """
    names = sorted({name for fit in fits for name in fit}, key=_place)
    record: dict[str, Any] = {"linears": names}
    for role in ROLES:
        of = [[fit[name] for fit in fits if name in fit] for name in names]
        totals = [max(1, sum(fit.total[role] for fit in each)) for each in of]
        record[role] = {"amax": [max(fit.amax[role] for fit in each) for each in of]} | {
            share: [
                sum(getattr(fit, share)[role] for fit in each) / total
                for each, total in zip(of, totals, strict=True)
            ]
            for share in ("underflow", "saturated")
        }
    return record


def _place(name: str) -> tuple[int, str]:
    layer, _, linear = name.partition(".")
    return int(layer), linear
