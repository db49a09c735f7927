"""What happens around a step: one callback a file. A run's own are named in its config."""

from megatron_hybrid.training.callbacks.base import Callback

__all__ = ["Callback"]
