"""Which device a process runs on, and megatron-core made ready for it.

Call `initialize()` once, first thing in a process that trains, evaluates or converts. With a CUDA
device it changes nothing; without one it applies the patches listed in `platform.cpu.PATCHES`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Platform:
    """Where this process computes.

    Attributes:
        device: where parameters and batches live: this process's current CUDA device, or the CPU.
        distributed_backend: what `torch.distributed` runs on.
        has_cuda: whether `device` is a CUDA device.
    """

    device: torch.device
    distributed_backend: Literal["gloo", "nccl"]
    has_cuda: bool


def initialize() -> Platform:
    """Check the engine's version and, without a CUDA device, make megatron-core run on the CPU.

    Also drops those of the engine's warnings that no user can act on (`platform.noise`).

    Idempotent. Best called before `megatron.core` is imported (its modules then load faster and
    without warnings about Transformer Engine), but right at any time. With CUDA, a launcher sets
    the device (`torch.cuda.set_device`) before the first call.

    Raises:
        UserError: the installed megatron-core is not one this release was made for.
    """
    from megatron_hybrid.platform.backend import check_engine_version

    check_engine_version()
    return _initialize_once()


@cache
def _initialize_once() -> Platform:
    from megatron_hybrid.platform.imports import importing

    with importing():
        return _import_and_patch()


def _import_and_patch() -> Platform:
    from megatron_hybrid.platform.imports import hidden
    from megatron_hybrid.platform.noise import silence

    silence()
    # The engine's timers import it if it is there, which costs every start a second.
    with hidden("wandb"):
        platform = _platform()
        import megatron.core.timers  # noqa: F401
    return platform


def _platform() -> Platform:
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return Platform(device=device, distributed_backend="nccl", has_cuda=True)

    from megatron_hybrid.platform.cpu import apply_patches
    from megatron_hybrid.platform.imports import hide_gpu_modules

    hide_gpu_modules()  # broken ones would end the engine's import
    count = apply_patches()
    logger.info("no CUDA device: megatron-core runs on the CPU over gloo, %d places patched", count)
    return Platform(device=torch.device("cpu"), distributed_backend="gloo", has_cuda=False)
