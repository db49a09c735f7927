"""Imported once by the fork server from which `run_distributed` forks its ranks."""

import gc
import importlib
import os

from megatron_hybrid.platform.warm import load

# What ranks of tests import beyond those that train.
MODULES = (
    "megatron_hybrid.config.scale",
    "megatron_hybrid.generation",
    "megatron_hybrid.objectives.masked_diffusion",
    "megatron_hybrid.objectives.sft",
    "megatron_hybrid.upcycling.write",
)

# Before torch looks for devices: a process that has started CUDA cannot fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
load()
for module in MODULES:
    importlib.import_module(module)
gc.freeze()
