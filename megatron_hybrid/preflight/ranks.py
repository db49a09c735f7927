"""What the ranks of a preflight do together, from meeting each other to the last collective."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from megatron_hybrid.config import RunConfig, validate
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.backend import probe
from megatron_hybrid.preflight import nodes
from megatron_hybrid.preflight.checks import Check
from megatron_hybrid.training.distributed import model_parallel_groups, select_device


def check_ranks(config: RunConfig, timeout_s: float) -> list[Check]:
    """Look at every node, and try the groups of the layout. All ranks call it together.

    Args:
        timeout_s: to be waited for a rank, and for a collective.

    Raises:
        UserError: ranks do not find each other; names them.
    """
    store = nodes.open_store(timeout_s)
    facts = nodes.exchange(store, config.run_dir, timeout_s)
    checks = nodes.compare(facts, config.run_dir, needs_gpus=config.backend == "transformer_engine")
    checks.append(_config_here(config))
    if any(check.name == "GPUs" and check.problems for check in checks):
        skipped = Check("collectives", "not checked: a rank has no GPU", skipped=True)
        return [*checks, skipped]
    select_device()
    platform = initialize()
    from megatron_hybrid.preflight import collectives  # and the engine, made ready for this device

    dist.init_process_group(
        platform.distributed_backend, store=dist.PrefixStore("groups", store),
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    try:
        with model_parallel_groups(config, platform):
            own = collectives.run_all(platform.device)
            everyone: list[tuple[str, list[collectives.Outcome]]] = [("", [])] * len(facts)
            dist.all_gather_object(everyone, (socket.gethostname(), own))
    finally:
        dist.destroy_process_group()
    hosts, outcomes = [host for host, _ in everyone], [each for _, each in everyone]
    return checks + collectives.checks(outcomes, hosts)


def _config_here(config: RunConfig) -> Check:
    """The rules that go by this rank's GPU, and by what is installed for it."""
    try:
        validate(config, world_size=int(os.environ["WORLD_SIZE"]), **probe().facts)
    except ConfigError as error:
        return Check("config on this device", "", tuple(error.problems))
    return Check("config on this device", probe().cuda_device or "CPU")
