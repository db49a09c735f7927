"""`RunConfig`: one run, whole. Its YAML form reads back to an equal config."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_hybrid.config.base import FilePath, Section, Text
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.sections import (
    CheckpointConfig,
    GpuConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
    UpcyclingConfig,
)
from megatron_hybrid.config.yaml_text import dump_yaml
from megatron_hybrid.errors import ConfigError


class RunConfig(Section):
    """Everything a run is. Made by `load_config` or `build_config`, which fill derived fields."""

    run_dir: FilePath = Field(
        default=Path("runs/default"), description="folder of the run: logs, metrics, checkpoints"
    )
    backend: Literal["auto", "torch", "transformer_engine"] = Field(
        default="auto",
        description="kernels; auto: transformer_engine where it is installed with a GPU",
    )
    preset: Text | None = Field(
        default=None, description="the named config that this one started from"
    )
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    gpu: GpuConfig = GpuConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    upcycling: UpcyclingConfig = UpcyclingConfig()
    logging: LoggingConfig = LoggingConfig()

    def vocabulary_problem(self, vocab_size: int) -> str | None:
        """Why the model cannot embed every id of a tokenizer of `vocab_size`; None where it can."""
        asked = self.model.vocab_size
        if asked is None or asked >= vocab_size:
            return None
        return (
            f"model.vocab_size={asked} must hold the tokenizer's {vocab_size} tokens; "
            f"allowed: null, {vocab_size} and more"
        )

    def with_vocab_size(self, vocab_size: int) -> "RunConfig":
        """A copy that knows its tokenizer's vocabulary: for whatever gives ids to the model.

        Raises:
            ConfigError: `model.vocab_size` is set, and smaller than the tokenizer's.
        """
        problem = self.vocabulary_problem(vocab_size)
        if problem is not None:
            raise ConfigError([problem])
        known = self.model.model_copy(update={"vocab_size": self.model.vocab_size or vocab_size})
        return self.model_copy(update={"model": known})

    def to_yaml(self) -> str:
        """Every field, in order, as YAML that `load_config` reads back to an equal config."""
        return dump_yaml(self.model_dump(mode="json"))
