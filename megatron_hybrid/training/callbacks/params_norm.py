"""`params_norm`: the norm of all parameters, a figure of each step that is reported."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_hybrid.training.callbacks.base import Callback, Step
from megatron_hybrid.training.extras import params_norm

if TYPE_CHECKING:
    from megatron_hybrid.training.trainer import Trainer


class ParamsNorm(Callback):
    """Takes a reduction over all ranks."""

    def metrics(self, run: "Trainer", step: Step) -> Mapping[str, float]:
        return {"params_norm": params_norm(run.optimizer)}
