"""Emulated float8 around a step: delayed scaling's memory, and now and then how operands fit."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.model.float8 import end_step, float8_linears
from megatron_hybrid.ops.float8 import ROLES, Fit


class Float8Steps:
    """What the ranks do together around each step of a model in emulated float8.

    Args:
        chunks: this rank's pipeline chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.linears = float8_linears(chunks)
        self._counts = False

    def begin(self, counts: bool) -> None:
        """Before a step's forward pass, and again if it is run again.

        Args:
            counts: find out how operands fit their format; the same on all ranks.
        """
        self._counts = counts
        for linear in self.linears.values():
            linear.fit = Fit() if self._counts else None

    def end(self) -> dict[str, Any] | None:
        """After the backward pass: what was counted, over all ranks; None in most steps."""
        end_step(self.linears)
        if not self._counts:
            return None
        own = {name: linear.fit for name, linear in self.linears.items()}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        return summary(everywhere) if any(everywhere) else None


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
