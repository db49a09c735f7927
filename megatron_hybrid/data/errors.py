"""The one error of the data package."""

from megatron_hybrid.errors import UserError


class DataError(UserError):
    """A tokenizer, text file, indexed file or blend that cannot be used as asked."""
