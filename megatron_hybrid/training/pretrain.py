"""`megatron-hybrid pretrain` on one rank: from a config to a finished run."""

import gc
import logging
import time
from contextlib import nullcontext

from megatron_hybrid.claim import claimed
from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.config.notes import notes
from megatron_hybrid.config.rules.context_parallel import chosen_way
from megatron_hybrid.human import say
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import probe, resolve_backend
from megatron_hybrid.platform.imports import importing
from megatron_hybrid.training.distributed import (
    is_rank_zero,
    launched_world_size,
    process_groups,
    select_device,
)
from megatron_hybrid.training.start import Start, claims, open_run

logger = logging.getLogger(__name__)

PLAN_PICTURE = "data_plan.png"


def pretrain(config: RunConfig) -> str:
    """Run the config on this rank; every rank of the launcher calls it.

    Args:
        config: as `load_config` returns it.

    Returns:
        Why the run ended: "finished", or what ended it early.

    Raises:
        UserError: the config does not fit these ranks, a file is missing or damaged, the data
            cannot be planned, or another process writes into the run's folders.
    """
    started = time.monotonic()
    select_device()
    platform = initialize()
    backend = resolve_backend(config.backend)
    validate(config, world_size=launched_world_size(), **probe().facts)
    # Before anything of the folders is read: what is read then is what will be gone on from.
    with claimed(claims(config), "pretrain") if is_rank_zero() else nullcontext():
        config, tokenizer, start = open_run(config, launched_world_size())
        if is_rank_zero():
            ranks = f"{launched_world_size()} ranks on {platform.device}, backend {backend}"
            say(ranks)
            if chosen := chosen_way(config, backend):
                say(chosen)
            for note in notes(config, launched_world_size()):
                say(f"note: {note}")
            _draw_plan(config, start)
        with process_groups(config, platform):
            with importing():
                from megatron_hybrid.training.trainer import Trainer
            gc.freeze()  # what is loaded stays: no collection between steps need look at it

            return Trainer(config, platform, backend, tokenizer, start, started).run()


def _draw_plan(config: RunConfig, start: Start) -> None:
    """Leave a picture of the data over time; that there is none is no reason not to train."""
    plan, consumed = start.data.plan, 0
    if plan is None:
        return
    if start.saved_plan is not None:
        consumed = start.saved_plan.consumed_samples
    path = config.run_dir / PLAN_PICTURE
    try:
        from megatron_hybrid.data.plan_picture import draw_plan  # and matplotlib, which is slow

        draw_plan(plan, path, config.run_dir.name, consumed)
    except Exception as error:
        logger.warning("%s could not be drawn: %s: %s", path, type(error).__name__, error)
