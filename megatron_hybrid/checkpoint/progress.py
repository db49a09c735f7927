"""Where the run that saved a checkpoint stood: its counters, ours or Megatron-LM's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.errors import CheckpointError
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.phases import run_tokens, sequence_lengths


@dataclass
class Progress:
    """Where a run stands; travels in the checkpoint.

    Attributes:
        iteration: steps done.
        consumed_samples: of the training data.
        loss_average: running mean of the loss that spikes are measured against, None at first.
        schedule_start_samples: consumed when the schedule of the learning rate began.
        objective_state: what the objective keeps from step to step, by name.
    """

    iteration: int = 0
    consumed_samples: int = 0
    loss_average: float | None = None
    schedule_start_samples: int = 0
    objective_state: dict[str, float] = field(default_factory=dict)


# What a checkpoint says of its origin that no run has saved, and what it is then; it has no
# optimizer's state.
UPCYCLING = "upcycling"
COMPRESSION = "compression"
_MADE = {UPCYCLING: "upcycled", COMPRESSION: "pruned"}


def made_of_another(common: Mapping[str, Any]) -> str | None:
    """How a checkpoint was made of another one, in a word; None: a run has saved it."""
    return next((word for name, word in _MADE.items() if name in common), None)


def is_ours(common: Mapping[str, Any]) -> bool:
    """Whether the part of a checkpoint that belongs to no rank says that this program wrote it."""
    return "progress" in common or made_of_another(common) is not None


def saved_progress(folder: Path, common: Mapping[str, Any], config: RunConfig) -> Progress | None:
    """The counters in the part of a checkpoint that belongs to no rank.

    Args:
        folder: of the checkpoint, for the error.
        config: of the run that goes on. Megatron-LM's own checkpoint counts samples in its
            arguments; where it does not, steps of one size tell them.

    Returns:
        None where neither does.

    Raises:
        CheckpointError: the counters are damaged, or of another version of this program.
    """
    if "progress" in common:
        return _progress(folder, common["progress"])
    iteration = int(common.get("iteration", 0))
    consumed = getattr(common.get("args"), "consumed_train_samples", None)
    if consumed is None:
        training = config.training
        if training.batch_size_schedule or len(set(sequence_lengths(config))) > 1:
            return None
        consumed = iteration * training.global_batch_size
    return Progress(iteration, int(consumed))


def _progress(folder: Path, recorded: Any) -> Progress:
    try:
        progress = Progress(**recorded)
        counts = (progress.iteration, progress.consumed_samples, progress.schedule_start_samples)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{recorded} must be whole numbers from 0")
        if not isinstance(progress.loss_average, float | int | None):
            raise ValueError(f"loss_average={progress.loss_average!r} must be a number or null")
        state = progress.objective_state
        if not isinstance(state, dict) or any(type(value) is not float for value in state.values()):
            raise ValueError(f"objective_state={state!r} must be numbers by name")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the progress in its common state: {error}") from error
    return progress


def ahead(config: RunConfig, progress: Progress | None) -> str:
    """What the config leaves to train after the steps of the run that saved a checkpoint."""
    if progress is None:
        return "the checkpoint does not count what was read"
    read = f"goes on at step {progress.iteration}, sample {progress.consumed_samples:,}"
    lengths, tokens = set(sequence_lengths(config)), run_tokens(config)
    if len(lengths) > 1 or tokens is None:
        return read
    samples = -(-tokens // lengths.pop())
    if samples > progress.consumed_samples:
        return f"{read} of {samples:,}"
    return f"{read}; NOTHING IS LEFT of the {samples:,} that the config asks for: set a longer run"
