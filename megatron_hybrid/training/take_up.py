"""Bring a rank's model and optimizer to where the run starts."""

import hashlib

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_hybrid.checkpoint.progress import Progress
from megatron_hybrid.checkpoint.saved_config import saved_config
from megatron_hybrid.config import RunConfig
from megatron_hybrid.data.datasets import RunData
from megatron_hybrid.data.saved_plan import DATA_PLAN_FILE
from megatron_hybrid.errors import UserError
from megatron_hybrid.human import say
from megatron_hybrid.training.checkpoint import load_checkpoint
from megatron_hybrid.training.distributed import is_rank_zero
from megatron_hybrid.training.start import Start


def refuse_other_plans(data: RunData) -> None:
    """Each rank has planned by itself: the files of their nodes must be the same."""
    if data.plan is None:
        return
    digest = hashlib.sha256(data.plan.to_json().encode()).hexdigest()
    digests = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise UserError(
            f"ranks {', '.join(map(str, others))} plan other data than rank 0: the token files "
            "of their nodes differ"
        )


def take_up(
    config: RunConfig, start: Start, model: list[torch.nn.Module], optimizer: MegatronOptimizer
) -> Progress:
    """Load the checkpoint that a run starts from, if any: how far it is.

    Raises:
        UserError: it cannot be loaded, or the plan beside it is another's.
    """
    folder, weights_only, is_own, upcycle = start.origin
    if folder is None:
        return Progress()
    if is_own:
        whole = config.checkpoint.model_copy(update={"load_optim": True, "load_rng": True})
        goes_on = config.optimizer.model_copy(update={"restart_schedule": False})
        config = config.model_copy(update={"checkpoint": whole, "optimizer": goes_on})
    progress = load_checkpoint(
        config, folder, model, optimizer, weights_only=weights_only, upcycle=upcycle
    )
    consumed = progress.consumed_samples
    if start.saved_plan is not None and start.saved_plan.consumed_samples != consumed:
        raise UserError(
            f"{folder}/{DATA_PLAN_FILE} is not of this checkpoint: it says that "
            f"{start.saved_plan.consumed_samples} samples were read, the checkpoint {consumed}"
        )
    saved = saved_config(folder)
    if saved is not None and saved.training.objective != config.training.objective:
        progress.loss_average, progress.objective_state = None, {}  # of other losses
    if is_rank_zero():
        done = "upcycled" if upcycle else "loaded"
        say(f"{done} {folder}: step {progress.iteration}")
        if consumed and start.saved_plan is None and start.data.plan is not None:
            say(
                f"{folder} holds no plan of its data: the run goes on at sample "
                f"{consumed} of the plan that its config makes, parts of which may have been "
                "read before in another order"
            )
    return progress
