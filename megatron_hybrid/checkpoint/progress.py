"""Where the run that saved a checkpoint stood: its counters, ours or Megatron-LM's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.phases import sequence_lengths


@dataclass
class Progress:
    """Where a run stands; travels in the checkpoint.

    Attributes:
        iteration: steps done.
        consumed_samples: of the training data.
        loss_average: running mean of the loss that spikes are measured against, None at first.
        schedule_start_samples: consumed when the schedule of the learning rate began.
    """

    iteration: int = 0
    consumed_samples: int = 0
    loss_average: float | None = None
    schedule_start_samples: int = 0


def saved_progress(common: Mapping[str, Any], config: RunConfig) -> Progress | None:
    """The counters in the part of a checkpoint that belongs to no rank.

    Args:
        config: of the run that goes on. Megatron-LM's own checkpoint counts samples in its
            arguments; where it does not, steps of one size tell them.

    Returns:
        None where neither does.
    """
    if "progress" in common:
        return Progress(**common["progress"])
    iteration = int(common.get("iteration", 0))
    consumed = getattr(common.get("args"), "consumed_train_samples", None)
    if consumed is None:
        training = config.training
        if training.batch_size_schedule or len(set(sequence_lengths(config))) > 1:
            return None
        consumed = iteration * training.global_batch_size
    return Progress(iteration, int(consumed))
