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
    # All that a rank that trains has: each fork would import it again.
    importlib.import_module("megatron_hybrid.training.trainer")
gc.freeze()  # a fork that looked through all this for garbage would copy it
