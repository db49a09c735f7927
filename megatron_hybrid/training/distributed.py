"""Start and stop the ranks' process groups: torch.distributed and megatron-core's on top of it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_hybrid.bounds import MOST_SECONDS
from megatron_hybrid.config import RunConfig
from megatron_hybrid.errors import UserError
from megatron_hybrid.platform import Platform
from megatron_hybrid.platform.noise import silence_warnings

COLLECTIVE_TIMEOUT_MINUTES = 30
# By which the watchdog comes first: it says more.
_WATCHDOG_MINUTES = 5
STAGE_SEED_STEP = 100


def launched_world_size() -> int:
    """How many ranks the launcher started (`WORLD_SIZE`, see `launchers.place`), 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process is the one that reports and writes shared files."""
    return int(os.environ.get("RANK", "0")) == 0


def on_rank_zero(work: Callable[[], None]) -> None:
    """Do something with shared files on rank 0 while the others wait. All ranks call it together.

    Raises:
        UserError: rank 0 could not; on every rank, so that none waits for ever.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            problem[0] = str(error) or type(error).__name__
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise UserError(problem[0])


def select_device() -> None:
    """Take this rank's GPU, where there are any; `platform.initialize` then finds it."""
    if torch.cuda.is_available():
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            raise UserError(
                f"LOCAL_RANK={local_rank} has no GPU of its own: this node shows {devices}; "
                f"allowed: at most {devices} ranks a node"
            )
        torch.cuda.set_device(local_rank)


def collective_timeout_minutes(config: RunConfig) -> int:
    """How long ranks wait for each other, which `training.hang_timeout_s` may ask to be longer."""
    hang_s = config.training.hang_timeout_s
    if hang_s is None:  # never
        return int(MOST_SECONDS // 60)
    return max(COLLECTIVE_TIMEOUT_MINUTES, math.ceil(hang_s / 60) + _WATCHDOG_MINUTES)


@contextmanager
def process_groups(config: RunConfig, platform: Platform, *, alone: bool = False) -> Iterator[None]:
    """torch.distributed, and the engine's model-parallel groups on top, for the time of the block.

    Ranks come from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT); without one this process is the only rank.

    Args:
        alone: this process is the only rank, whatever the environment says.
    """
    timeout = timedelta(minutes=collective_timeout_minutes(config))
    if "RANK" in os.environ and not alone:
        dist.init_process_group(platform.distributed_backend, timeout=timeout)
    else:
        dist.init_process_group(
            platform.distributed_backend,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
        )
    try:
        with model_parallel_groups(config, platform):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel_groups(config: RunConfig, platform: Platform) -> Iterator[None]:
    """megatron-core's groups for the layout of a config, and every random generator seeded.

    torch.distributed is initialised already.
    """
    from megatron.core import parallel_state, tensor_parallel

    silence_warnings()  # again: Transformer Engine, imported by now, has put its own first
    initialize_groups(config, platform)
    try:
        # Stages draw other weights; the engine itself tells only tensor and expert ranks apart.
        stage = parallel_state.get_pipeline_model_parallel_rank()
        seed = config.training.seed + STAGE_SEED_STEP * stage
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(
            seed, use_cudagraphable_rng=config.gpu.cuda_graph_impl != "none"
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()


def initialize_groups(config: RunConfig, platform: Platform) -> None:
    """Make the engine's groups for the layout of a config; there are none in force yet."""
    from megatron.core import parallel_state

    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=collective_timeout_minutes(config),
        # On the CPU the groups are gloo's already.
        create_gloo_process_groups=platform.has_cuda,
    )
