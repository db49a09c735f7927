"""What a step minimises: one objective a file. A run's own is named in its config."""

from megatron_hybrid.objectives.base import Losses, Objective

__all__ = ["Losses", "Objective"]
