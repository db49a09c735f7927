"""A step that was not finite is watched when the run comes to it again: which rank's doing is it?

The first time, the run ends and is started again. From then on up to that step, each rank looks at
what its layers and its loss come to and, before they are added up, at its gradients. Where one is
not finite, megatron-core's rerun state machine runs the step again in place. What is finite then
was a passing error of that device. What is not may be the run's own doing, or that of a device
which computes wrongly again and again: a start on other devices, by `attempts.jsonl`, tells.

(The engine can keep the step in a checkpoint of its own and go on from there. Here every start
comes to the same step with the same bits from the last checkpoint, so it need not.)
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    RerunState,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from torch import Tensor

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.training.findings import Diagnosis, Finding, acquit, diagnose

LAYER, LOSS = "the output of layer", "the loss"


class StepWatch:
    """Watches the steps of this start, up to the last one that was not finite in an earlier one.

    All ranks make it together, and close it.

    Args:
        model: this rank's pipeline chunks under DDP.
        pattern: a symbol a layer.
        before: steps that were not finite in earlier starts, by `findings.unsound_steps`.
    """

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        pattern: str,
        before: Mapping[int, Sequence[Sequence[Finding]]],
    ) -> None:
        self.last_iteration = max(before)
        self._before = before
        self._ddp_configs = [chunk.ddp_config for chunk in model]
        self._pattern = pattern
        self._data: RerunDataIterator | None = None
        self.findings: list[Finding] = []
        initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
        # It passes over the first step of a start, as the engine may have no checkpoint then.
        get_rerun_state_machine().first_iteration_complete = True
        for ddp_config in self._ddp_configs:
            ddp_config.check_for_nan_in_grad = True
        self._hooks = [
            layer.register_forward_hook(self._check_layer)
            for chunk in model
            for stack in chunk.modules()
            if isinstance(stack, HybridStack)
            for layer in stack.layers
        ]

    def close(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()
        for ddp_config in self._ddp_configs:
            ddp_config.check_for_nan_in_grad = False
        destroy_rerun_state_machine()

    def passes(self, data: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
        """The micro batches of a step; once more, if this time something was not finite.

        `findings` then holds what every rank saw.
        """
        machine = get_rerun_state_machine()
        if self._data is None:
            self._data = RerunDataIterator(data)
        while machine.should_run_forward_backward(self._data):
            yield map(next, repeat(self._data))
        if machine.state != RerunState.NOT_RUNNING_YET:
            self.findings = _gather(self._own_finding())

    def check_loss(self, loss: Tensor) -> None:
        """Look at the sum of a micro batch's losses, `[]`."""
        self._check(loss.detach(), LOSS)

    def diagnose(self, iteration: int) -> Diagnosis:
        """What the findings of this step say."""
        return diagnose(
            self.findings, [found for found in self._before.get(iteration, ()) if found]
        )

    def acquit(self, iteration: int) -> str | None:
        """All ranks together: what it says that this step was finite; None if it always was."""
        if iteration not in self._before:
            return None
        here: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(here, _own_place())
        return acquit(dict(enumerate(here)), self._before[iteration])

    def _check_layer(self, layer: Any, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        number = layer.layer_number
        self._check(hidden.detach(), f"{LAYER} {number} ({self._pattern[number - 1]})")

    def _check(self, value: Tensor, what: str) -> None:
        machine = get_rerun_state_machine()
        if machine.state == RerunState.NOT_RUNNING_YET:  # an evaluation
            return
        machine.validate_result(
            value.float().abs().max(),
            rejection_func=lambda largest: not torch.isfinite(largest),
            comparison_func=_same_kind,
            message=what,
        )

    def _own_finding(self) -> Finding | None:
        machine = get_rerun_state_machine()
        call = machine.failed_validation_call
        if call is None:
            return None
        stage, what = parallel_state.get_pipeline_model_parallel_rank(), call.caller.message
        if what == LOSS:
            order = (1, 0)
        elif what.startswith(LAYER):
            order = (0, int(what.removeprefix(LAYER).split()[0]))
        else:  # the engine's words for gradients, which the last stage has first
            order, what = (2, -stage), "the gradients"
        return Finding(dist.get_rank(), *_own_place(), order, what, machine.checkpoint_requested)


def _own_place() -> tuple[str, int | None]:
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    return socket.gethostname(), device


def _gather(own: Finding | None) -> list[Finding]:
    """The findings of all ranks that have one."""
    found: list[Finding | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return [finding for finding in found if finding is not None]


def _same_kind(first: Tensor, again: Tensor) -> float:
    """0 if both are not finite: NaN and Inf are no numbers that could be near each other."""
    return 0.0 if not torch.isfinite(again) else float("inf")
