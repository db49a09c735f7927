"""Imported once by the fork server from which `run_distributed` forks its ranks."""

import importlib
import os

from megatron_hybrid.platform import initialize

# Before torch looks for devices: a process that has started CUDA cannot fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
initialize()
# All that a rank that trains has: each fork would import it again.
importlib.import_module("megatron_hybrid.training.trainer")
