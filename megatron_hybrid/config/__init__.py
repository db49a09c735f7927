"""One typed config: `RunConfig`, made by `load_config` from a preset, a YAML file and words.

Imports neither torch nor the engine, so that a wrong config is found in a moment.
"""

from megatron_hybrid.config.check import build_config, validate
from megatron_hybrid.config.data import DataConfig, PhaseConfig, SourceConfig
from megatron_hybrid.config.lengths import Lengths, lengths
from megatron_hybrid.config.load import load_config, presets
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.phases import Phase, batch_sizes, phases, run_tokens, sources
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.sections import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
    UpcyclingConfig,
)
from megatron_hybrid.config.tracker import CONFIG_FILE, TRACKER_FILE, latest_folder

__all__ = [
    "CONFIG_FILE",
    "TRACKER_FILE",
    "CheckpointConfig",
    "DataConfig",
    "Lengths",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Phase",
    "PhaseConfig",
    "PrecisionConfig",
    "RunConfig",
    "SourceConfig",
    "TrainingConfig",
    "UpcyclingConfig",
    "batch_sizes",
    "build_config",
    "latest_folder",
    "lengths",
    "load_config",
    "phases",
    "presets",
    "run_tokens",
    "sources",
    "validate",
]
