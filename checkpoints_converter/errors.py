"""What can be wrong with the files that are converted."""

from megatron_hybrid.errors import UserError


class ConversionError(UserError):
    """A checkpoint or model folder that is damaged, or that cannot be converted exactly."""
