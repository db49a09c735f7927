"""What can be wrong with a distributed checkpoint."""

from megatron_hybrid.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is damaged, not whole, or not of the model that is asked for."""
