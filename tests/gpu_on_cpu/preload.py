"""Imported once by the fork server from which `run_on_gpus` forks its ranks."""

import os
from importlib import import_module

from tests.gpu_on_cpu import stand_in

# Before torch looks for real ones: a process that has started CUDA cannot fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
stand_in.install()
import_module("megatron_hybrid.training.trainer")
import_module("megatron.core.extensions.transformer_engine")
