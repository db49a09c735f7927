"""Imported once by the fork server from which `run_distributed` forks its ranks."""

import gc
import importlib
import os

from megatron_hybrid.platform import initialize
from megatron_hybrid.platform.imports import importing

# Before torch looks for devices: a process that has started CUDA cannot fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
with importing():
    initialize()
    # All that a rank that trains and saves has: each fork would import it again.
    for module in (
        "megatron_hybrid.training.trainer",
        "megatron_hybrid.model.hybrid",
        "megatron_hybrid.layers.attention",
        "megatron_hybrid.layers.cross_entropy",
        "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
        "megatron.core.dist_checkpointing.strategies.fully_parallel",
        "megatron.core.dist_checkpointing.strategies.state_dict_saver",
        "megatron.core.models.mimo.optimizer",  # which the engine's optimizer asks for
    ):
        importlib.import_module(module)
gc.freeze()  # a fork that looked through all this for garbage would copy it
