"""What ranks import, imported before they are forked: the launcher's ranks, and those of tests."""

import gc
import importlib
import sys

from megatron_hybrid.platform.imports import importing
from megatron_hybrid.platform.threads import NVIDIA_DRIVER

# All that a rank that trains and saves has: each fork would import it again.
MODULES = (
    "megatron_hybrid.training.pretrain",
    "megatron_hybrid.training.trainer",
    "megatron_hybrid.training.checkpoint",
    "megatron_hybrid.training.lasting_output",
    "megatron_hybrid.training.upcycle",
    "megatron_hybrid.model.build",
    "megatron_hybrid.model.hybrid",
    "megatron_hybrid.layers.attention",
    "megatron_hybrid.layers.cross_entropy",
    "megatron_hybrid.layers.gated_delta_net",
    "megatron_hybrid.layers.mamba1",
    "megatron_hybrid.layers.moe",
    "megatron_hybrid.layers.mamba2",
    "megatron_hybrid.objectives.pretraining",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.models.mimo.optimizer",  # which the engine's optimizer asks for
    "torch.utils.serialization.config",
)


def load_for_forks() -> bool:
    """Import what ranks need, where they may be forks: on Linux, without GPUs.

    Returns:
        Whether they may.
    """
    if sys.platform != "linux" or NVIDIA_DRIVER.exists():
        return False
    load()
    return True


def load() -> None:
    """Import what ranks need; nothing in this process may have begun with CUDA."""
    from megatron_hybrid.platform import initialize

    with importing():
        initialize()
        for module in MODULES:
            importlib.import_module(module)
    gc.freeze()  # a fork that looked through all this for garbage would copy it
