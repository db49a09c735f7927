"""Imported once by the fork server from which `run_distributed` forks its ranks."""

import os

from megatron_hybrid.platform.warm import load

# Before torch looks for devices: a process that has started CUDA cannot fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
load()
